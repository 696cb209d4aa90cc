"""Measure a training step of OLMo-core on the CPU; prints one JSON line with tokens/s.

Model, layout, optimizer, clipping and the step itself (`zero_grads`, `train_batch`, `optim_step`) are OLMo-core's. Only
its `Trainer` (data loading, logging, checkpoints) is replaced, by an object that stores the last loss, so that only the
step is timed. Layouts of two ranks start under `torchrun --nproc-per-node 2`.

    OMP_NUM_THREADS=1 python step_olmo_core.py --layout one
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 step_olmo_core.py --layout tp2
"""

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import olmo_core.version
import torch
import torch.distributed as dist
from olmo_core.distributed.parallel import DataParallelType, PipelineScheduleType
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.transformer import TransformerConfig, TransformerDataParallelWrappingStrategy
from olmo_core.optim import AdamWConfig, SkipStepAdamWConfig
from olmo_core.train.train_module import TrainModule
from olmo_core.train.train_module.transformer import (
    TransformerDataParallelConfig,
    TransformerPipelineParallelConfig,
    TransformerTensorParallelConfig,
    TransformerTrainModuleConfig,
)

SEQUENCES, LENGTH, VOCAB, LAYERS = 8, 512, 8192, 6
VERSION = olmo_core.version.VERSION
LAYOUTS = ("one", "dp2", "tp2", "pp2")


class StepTrainer(SimpleNamespace):
    """The part of a trainer that a train module uses; keeps the loss of the last step (None before the last stage)."""

    loss: torch.Tensor | None = None

    def record_metric(self, *_: Any, **__: Any) -> None:
        pass

    def record_ce_loss(self, value: torch.Tensor, reduce_type: Any = None) -> None:
        self.loss = value


def main() -> None:
    args = _arguments()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.layout != "one":
        dist.init_process_group("gloo")
    module = _train_module(args)
    shards = 2 if args.layout == "dp2" else 1
    trainer = StepTrainer(global_batch_size=SEQUENCES * LENGTH, dp_process_group=module.dp_process_group)
    module._attach_trainer(trainer)
    module.pre_train()
    tokens = _tokens(_rank() if shards == 2 else 0, shards)
    seconds, cpu_seconds, losses = [], [], []
    for _ in range(args.warmup + args.steps):
        started = time.process_time()
        seconds.append(_timed(module, tokens))
        cpu_seconds.append(_sum(time.process_time() - started))
        losses.append(_loss(trainer, args.layout))
    if _rank() == 0:
        _report(args, seconds[args.warmup :], cpu_seconds[args.warmup :], losses)
    if dist.is_initialized():
        dist.destroy_process_group()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--microbatch", type=int, help="sequences per forward pass (default: the fastest measured)")
    parser.add_argument(
        "--wrapper", choices=["ddp", "fsdp", "fsdp-blocks", "hsdp"], help="(default: the fastest that trains)"
    )
    parser.add_argument("--optimizer", choices=["fused", "foreach", "loop", "skipstep"], default="fused", help="AdamW")
    parser.add_argument("--pipeline", default="1F1B", help="schedule of pp2: GPipe, Interleaved1F1B, ...")
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    args.microbatch = args.microbatch or (1 if args.layout == "pp2" else 4)
    args.wrapper = args.wrapper or ("fsdp" if args.layout == "tp2" else "ddp")  # ddp with tp2 updates nothing
    return args


def _train_module(args: argparse.Namespace) -> Any:
    config = TransformerConfig.llama2_271M(
        VOCAB, n_layers=LAYERS, n_heads=16, attn_backend=AttentionBackendName.torch, init_seed=0
    )
    model = config.build(init_device="meta" if args.layout == "pp2" else "cpu")
    assert model.num_params == 2 * VOCAB * 1024 + LAYERS * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 1024
    parts: dict[str, Any] = {}
    if args.layout != "one":
        parts["dp_config"] = TransformerDataParallelConfig(name=DataParallelType(args.wrapper.split("-")[0]))
        if args.wrapper == "fsdp-blocks":
            parts["dp_config"].wrapping_strategy = TransformerDataParallelWrappingStrategy.blocks
        if args.wrapper == "hsdp":
            parts["dp_config"] = replace(parts["dp_config"], num_replicas=1, shard_degree=2)
    if args.layout == "tp2":
        parts["tp_config"] = TransformerTensorParallelConfig(degree=2)
    if args.layout == "pp2":
        parts["pp_config"] = _pipeline(args.pipeline)
    return TransformerTrainModuleConfig(
        rank_microbatch_size=args.microbatch * LENGTH,
        max_sequence_length=LENGTH,
        optim=_optimizer(args),
        max_grad_norm=1.0,
        **parts,
    ).build(model, device=torch.device("cpu"))


def _optimizer(args: argparse.Namespace) -> Any:
    common: dict[str, Any] = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if args.optimizer == "skipstep":
        return SkipStepAdamWConfig(**common)
    return AdamWConfig(**common, fused=args.optimizer == "fused", foreach=args.optimizer == "foreach")


def _pipeline(kind: str) -> TransformerPipelineParallelConfig:
    """OLMo-core 2 uses PyTorch's schedules; version 3 has two custom ones, both for two stages per rank and CUDA."""
    if int(VERSION.split(".")[0]) < 3:
        schedule = PipelineScheduleType(kind)
        return TransformerPipelineParallelConfig(
            degree=2, schedule=schedule, split_points=[2] if schedule.is_single_stage else [1, 2, 3]
        )
    return TransformerPipelineParallelConfig(
        degree=2,
        schedule=PipelineScheduleType(f"Custom{kind}"),
        split_points=[1, 2, 3],
        use_custom_stage_implementation=True,
    )


def _tokens(shard: int, shards: int) -> torch.Tensor:
    """Return this rank's sequences of the batch, the same in every step."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=generator).chunk(shards)[shard]


def _timed(module: TrainModule, tokens: torch.Tensor) -> float:
    _barrier()
    start = time.perf_counter()
    module.zero_grads()
    module.train_batch({"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()})
    module.optim_step()
    _barrier()
    return time.perf_counter() - start


def _loss(trainer: StepTrainer, layout: str) -> float:
    """Return the mean loss over the global batch."""
    loss = torch.zeros(()) if trainer.loss is None else trainer.loss.detach().clone()
    return _sum(loss.item()) / (2 if layout in ("dp2", "tp2") else 1)


def _report(args: argparse.Namespace, seconds: list[float], cpu_seconds: list[float], losses: list[float]) -> None:
    line = {
        "what": f"olmo-core {VERSION}",
        "layout": args.layout,
        "tokens_per_s": round(SEQUENCES * LENGTH / statistics.median(seconds), 1),
        "step_s": [round(second, 3) for second in seconds],
        "cpu_s": [round(second, 3) for second in cpu_seconds],  # of all ranks
        "loss": [round(loss, 4) for loss in losses],
        "microbatch": args.microbatch,
        "optimizer": args.optimizer,
    }
    if args.layout != "one":
        line["wrapper"] = args.wrapper
    if args.layout == "pp2":
        line["pipeline"] = args.pipeline
    print(json.dumps(line), flush=True)


def _sum(value: float) -> float:
    """Over the ranks."""
    total = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
