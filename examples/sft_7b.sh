#!/usr/bin/env bash
""":"
# Fine-tunes Llama-2-7B on conversations (examples/configs/sft_llama2_7b.yaml). Like examples/pretrain_7b.sh, it is
# valid bash and valid Python:
#
#   bash examples/sft_7b.sh [--section.key VALUE ...]                           starts torchrun itself
#   torchrun --nproc-per-node 8 examples/sft_7b.sh [--section.key VALUE ...]    torchrun hands it to Python
#   torchrun --no-python --nproc-per-node 8 examples/sft_7b.sh [...]            torchrun executes it
#
# First preprocess the data, with the tokenizer and the chat template of the model:
#   python tools/preprocess_data.py --task sft --input chats.jsonl --tokenizer-model DIR --max-length 4097 \
#       --output-prefix data/chats
. "$(dirname "$0")/launch.sh"
: <<'# end'
":"""

import sys
from pathlib import Path

from engine.__main__ import main
from engine.errors import run_program

if __name__ == "__main__":
    config = Path(__file__).resolve().parent / "configs" / "sft_llama2_7b.yaml"
    run_program(lambda: main(["train", str(config), *sys.argv[1:]]))
# end
