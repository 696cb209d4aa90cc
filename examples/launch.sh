# Sourced by examples/pretrain_7b.sh and sft_7b.sh: starts torchrun with the script, or Python in a rank that torchrun
# has started. Reads NPROC_PER_NODE (default: the GPUs, or 2 on a CPU), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
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
# A receive of a pipeline stage waits on the GPU. With few hardware queues, kernels of other streams wait behind it; that
# the engine is safe even with one queue is proven in a model of the hardware only, so it refuses 1.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-32}"
# torchrun kills the ranks 30 s after SIGTERM by default; a step and a checkpoint of this size take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}"
if [ "${NNODES:-1}" -gt 1 ]; then
    meet=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?NNODES is set, so NODE_RANK must be}" \
          --master-addr "${MASTER_ADDR:?NNODES is set, so MASTER_ADDR must be}" --master-port "${MASTER_PORT:-29500}")
else
    meet=(--standalone)
fi
exec torchrun "${meet[@]}" --nproc-per-node "$NPROC_PER_NODE" "$0" "$@"
