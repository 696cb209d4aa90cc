#!/usr/bin/env bash
""":"
# Pretrains Llama-2-7B (examples/configs/llama2_7b.yaml). This file is valid bash and valid Python, so all of these work:
#
#   bash examples/pretrain_7b.sh [--section.key VALUE ...]                           starts torchrun itself
#   torchrun --nproc-per-node 8 examples/pretrain_7b.sh [--section.key VALUE ...]    torchrun hands it to Python
#   torchrun --no-python --nproc-per-node 8 examples/pretrain_7b.sh [...]            torchrun executes it
#
# Several nodes: start the same line on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set (see slurm/).
# To look at it on a laptop: append --model.preset tiny and your data, as in examples/configs/tiny.yaml.
set -euo pipefail

if [ -n "${LOCAL_RANK:-}" ]; then
    exec python3 -u "$0" "$@"
fi

if [ -z "${NPROC_PER_NODE:-}" ]; then
    NPROC_PER_NODE=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    [ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=2
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(( $(getconf _NPROCESSORS_ONLN) / NPROC_PER_NODE ))
    export OMP_NUM_THREADS=$(( threads > 0 ? threads : 1 ))
fi
# After SIGTERM torchrun gives the ranks 30 s and kills them; a step and a checkpoint of this size need more.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}"
if [ "${NNODES:-1}" -gt 1 ]; then
    meet=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?NNODES is set, so NODE_RANK must be}" \
          --master-addr "${MASTER_ADDR:?NNODES is set, so MASTER_ADDR must be}" --master-port "${MASTER_PORT:-29500}")
else
    meet=(--standalone)
fi
exec torchrun "${meet[@]}" --nproc-per-node "$NPROC_PER_NODE" "$0" "$@"
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
