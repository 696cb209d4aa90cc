#!/usr/bin/env bash
""":"
# Pretrains Llama-2-7B (examples/configs/llama2_7b.yaml). This file is valid bash and valid Python, so all of these
# work:
#
#   bash examples/pretrain_7b.sh [--section.key VALUE ...]                           starts the ranks, as triaxis train
#   torchrun --nproc-per-node 8 examples/pretrain_7b.sh [--section.key VALUE ...]    torchrun hands it to Python
#   torchrun --no-python --nproc-per-node 8 examples/pretrain_7b.sh [...]            torchrun executes it
#
# The first way reads NPROC_PER_NODE (default: the GPUs, or 2 on a CPU). Several nodes: start the same line on each, with
# NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set (see slurm/).
# To try it on a laptop: append --model.preset tiny and your data, as in examples/configs/tiny.yaml.
set -euo pipefail
# Without a GPU two ranks; in a rank that torchrun has started, the variable says nothing.
nvidia-smi -L > /dev/null 2>&1 || export NPROC_PER_NODE="${NPROC_PER_NODE:-2}"
exec python3 -u -m engine train "$(dirname "$0")/configs/llama2_7b.yaml" "$@"
: <<'# end'
":"""

import sys
from pathlib import Path

from engine.cli.main import main
from engine.errors import run_program

if __name__ == "__main__":
    config = Path(__file__).resolve().parent / "configs" / "llama2_7b.yaml"
    run_program(lambda: main(["train", str(config), *sys.argv[1:]]))
# end
