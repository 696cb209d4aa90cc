"""Measure a training step of Megatron-core on the CPU; prints one JSON line with tokens/s.

Model (`GPTModel` with the local layer spec), distributed data parallel, pipeline schedule and optimizer are
Megatron-core's. It expects CUDA everywhere; `_pretend_cpu_is_cuda` redirects the few calls on this path. Not available
here: Transformer Engine, Apex and its CUDA kernels, hence no flash attention (the local spec's attention materializes
the full score matrix; `--attention sdpa` uses PyTorch's through the spec, which is in its favor) and no sequence
parallelism (the local spec's norm does not support it).

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 1 step_megatron_core.py --layout one
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 step_megatron_core.py --layout tp2
"""

import argparse
import contextlib
import json
import logging
import os
import statistics
import time
import warnings
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

warnings.filterwarnings("ignore")
SEQUENCES, LENGTH, VOCAB, LAYERS = 8, 512, 8192, 6
LAYOUTS = ("one", "dp2", "tp2", "pp2")


def _pretend_cpu_is_cuda() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    for name in ("zeros", "ones", "tensor", "empty"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(create: Any) -> Any:
    @wraps(create)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return create(*args, **kwargs)

    return wrapped


_pretend_cpu_is_cuda()

import megatron.core as mcore  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer import optimizer as mcore_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import ModuleSpec, TransformerConfig  # noqa: E402


class SdpaAttention(torch.nn.Module):
    """PyTorch's attention in place of `DotProductAttention`: (s, b, heads, 64) -> (s, b, hidden)."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class NoRngTracker:
    """Replaces the CUDA generator states; nothing here is random after initialization."""

    fork = staticmethod(lambda *_: contextlib.nullcontext())
    is_initialized = staticmethod(lambda: True)


def _clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    """Megatron-core's function, without its assertion that gradients are on a GPU."""
    coefficient = max_norm / (total_norm + 1e-6)
    if coefficient < 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], coefficient)


def main() -> None:
    args = _arguments()
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2 if args.layout == "tp2" else 1,
        pipeline_model_parallel_size=2 if args.layout == "pp2" else 1,
    )
    assert dist.get_world_size() == (1 if args.layout == "one" else 2)
    torch.manual_seed(0)
    tensor_parallel.get_cuda_rng_tracker = lambda *_: NoRngTracker()
    mcore_optimizer.clip_grad_by_total_norm_fp32 = _clip
    model, optimizer = _model(args)
    seconds, cpu_seconds, losses = [], [], []
    tokens = _tokens(args)
    for _ in range(args.warmup + args.steps):
        started = time.process_time()
        second, loss = _timed(args, model, optimizer, tokens)
        cpu_seconds.append(_sum(time.process_time() - started))
        seconds.append(second)
        losses.append(_mean(loss, args.layout))
    if dist.get_rank() == 0:
        _report(args, seconds[args.warmup :], cpu_seconds[args.warmup :], losses)
    dist.destroy_process_group()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--microbatch", type=int, help="sequences per forward pass (default: 1 in pp2, else 4)")
    parser.add_argument("--attention", choices=["local", "sdpa"], default="sdpa")
    parser.add_argument("--optimizer", choices=["default", "fused"], default="fused", help="torch AdamW's variant")
    parser.add_argument("--fusions", action=argparse.BooleanOptionalAction, default=False, help="compiled by inductor")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True, help="gradient reduction")
    parser.add_argument("--sharded", action="store_true", help="the distributed optimizer")
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    args.microbatch = args.microbatch or (1 if args.layout == "pp2" else 4)
    return args


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    config = _config(args)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if args.attention == "sdpa":
        spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=SdpaAttention)
    gpt = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    count = sum(p.numel() for p in gpt.parameters())
    if args.layout in ("one", "dp2"):
        assert count == 2 * VOCAB * 1024 + LAYERS * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 1024, count
    ddp = DistributedDataParallelConfig(
        overlap_grad_reduce=args.overlap and args.layout == "dp2",
        use_distributed_optimizer=args.sharded,
        bucket_size=12_000_000,
    )
    model = DistributedDataParallel(config, ddp, gpt)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = model.no_sync
    adam = {"adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "clip_grad": 1.0}
    settings = OptimizerConfig(
        optimizer="adam", lr=args.lr, params_dtype=torch.float32, use_distributed_optimizer=args.sharded, **adam
    )
    optimizer = get_megatron_optimizer(settings, [model])
    if args.optimizer == "fused":
        for group in optimizer.param_groups:
            group["fused"] = True
    return model, optimizer


def _config(args: argparse.Namespace) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=16,
        kv_channels=64,
        ffn_hidden_size=2816,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=args.fusions,
        bias_dropout_fusion=args.fusions,
        cross_entropy_loss_fusion=args.fusions,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=True,
        tensor_model_parallel_size=2 if args.layout == "tp2" else 1,
        pipeline_model_parallel_size=2 if args.layout == "pp2" else 1,
    )


def _tokens(args: argparse.Namespace) -> list[torch.Tensor]:
    """Return this rank's microbatches of the batch, the same in every step."""
    tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    if args.layout == "dp2":
        tokens = tokens.chunk(2)[dist.get_rank()]
    return list(tokens.split(args.microbatch))


def _timed(args: argparse.Namespace, model: Any, optimizer: Any, batch: list[torch.Tensor]) -> tuple[float, Any]:
    dist.barrier()
    start = time.perf_counter()
    model.zero_grad_buffer()
    optimizer.zero_grad()
    results = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iter(batch),
        model=[model],
        num_microbatches=len(batch),
        seq_length=LENGTH,
        micro_batch_size=args.microbatch,
        forward_only=False,
    )
    success, _, _ = optimizer.step()
    assert success
    dist.barrier()
    return time.perf_counter() - start, results


def _forward(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(LENGTH).expand(len(tokens), -1)
    output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return output, partial(_loss)


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.mean()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place


def _mean(results: Any, layout: str) -> float:
    """Return the mean loss over the global batch."""
    loss = torch.stack([result["loss"] for result in results]).mean() if results else torch.zeros(())
    return _sum(loss.item()) / (2 if layout in ("dp2", "tp2") else 1)


def _sum(value: float) -> float:
    """Over the ranks."""
    total = torch.tensor(value)
    dist.all_reduce(total)
    return total.item()


def _report(args: argparse.Namespace, seconds: list[float], cpu_seconds: list[float], losses: list[float]) -> None:
    line = {
        "what": f"megatron-core {mcore.__version__}",
        "layout": args.layout,
        "tokens_per_s": round(SEQUENCES * LENGTH / statistics.median(seconds), 1),
        "step_s": [round(second, 3) for second in seconds],
        "cpu_s": [round(second, 3) for second in cpu_seconds],  # of all ranks
        "loss": [round(loss, 4) for loss in losses],
    }
    names = ("microbatch", "attention", "optimizer", "fusions", "overlap", "sharded")
    print(json.dumps(line | {name: getattr(args, name) for name in names}), flush=True)


if __name__ == "__main__":
    main()
