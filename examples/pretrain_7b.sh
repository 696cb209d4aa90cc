#!/usr/bin/env bash
""":"
# Pretrains Llama-2-7B (examples/configs/llama2_7b.yaml). This file is valid bash and valid Python, so all of these
# work:
#
#   bash examples/pretrain_7b.sh [--section.key VALUE ...]                           starts torchrun itself
#   torchrun --nproc-per-node 8 examples/pretrain_7b.sh [--section.key VALUE ...]    torchrun hands it to Python
#   torchrun --no-python --nproc-per-node 8 examples/pretrain_7b.sh [...]            torchrun executes it
#
# Several nodes: start the same line on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set (see slurm/).
# To try it on a laptop: append --model.preset tiny and your data, as in examples/configs/tiny.yaml.
. "$(dirname "$0")/launch.sh"
: <<'# end'
":"""

import sys
from pathlib import Path

from engine.__main__ import main
from engine.errors import run_program

if __name__ == "__main__":
    config = Path(__file__).resolve().parent / "configs" / "llama2_7b.yaml"
    run_program(lambda: main(["train", str(config), *sys.argv[1:]]))
# end
