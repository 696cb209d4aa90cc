#!/usr/bin/env bash
""":"
# Fine-tunes Llama-2-7B on conversations (examples/configs/sft_llama2_7b.yaml). Like examples/pretrain_7b.sh, it is
# valid bash and valid Python:
#
#   bash examples/sft_7b.sh [--section.key VALUE ...]                           starts the ranks, as triaxis train
#   torchrun --nproc-per-node 8 examples/sft_7b.sh [--section.key VALUE ...]    torchrun hands it to Python
#   torchrun --no-python --nproc-per-node 8 examples/sft_7b.sh [...]            torchrun executes it
#
# First preprocess the data, with the tokenizer and the chat template of the model:
#   triaxis preprocess --task sft --input chats.jsonl --tokenizer-model DIR --max-length 4097 \
#       --output-prefix data/chats
set -euo pipefail
# Without a GPU two ranks; in a rank that torchrun has started, the variable says nothing.
nvidia-smi -L > /dev/null 2>&1 || export NPROC_PER_NODE="${NPROC_PER_NODE:-2}"
exec python3 -u -m engine train "$(dirname "$0")/configs/sft_llama2_7b.yaml" "$@"
: <<'# end'
":"""

import sys
from pathlib import Path

from engine.cli.main import main
from engine.errors import run_program

if __name__ == "__main__":
    config = Path(__file__).resolve().parent / "configs" / "sft_llama2_7b.yaml"
    run_program(lambda: main(["train", str(config), *sys.argv[1:]]))
# end
