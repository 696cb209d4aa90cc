"""Parity checks: a run in any layout gives the same numbers as a single process.

A `Case` is a way to partition a `Problem` over ranks. It runs `train` end to end and compares the files that a user
gets: losses and gradient norms in `metrics.jsonl`, and fp32 parameters of the checkpoint, which is thereby shown to be
complete. Each rank also records a digest of every parameter at every step: ranks with the same part of a tensor must
have the same bits. Alternative considered: comparing gradients inside the engine, which needs hooks that training does
not have.

Two settings keep the problems well conditioned, independently of the layout. Their effect was measured in one process
by splitting the same batch into different microbatches:
- `model.init_std` is 0.1. With 0.02, the embedding of a rare token comes close to zero after a few steps, its norm
  layer amplifies rounding errors, and the gradient norm of that one step changes by 6e-4; attention is also almost
  uniform, so that errors in it would have little effect.
- `optimizer.eps` is 1e-4. Slowly rotating dimensions of a key bias add nearly the same value to all scores of a query,
  which softmax ignores: their gradients of 1e-8 are accurate to 1e-10, and with an eps of 1e-8 Adam turns that error
  into 3e-3 of the bias.
"""

import gc
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import xxhash
import yaml
from torch import Tensor

import engine.train.run
import engine.train.step
from engine.checkpoint.run_directory import open_checkpoint
from engine.config.schema import Config, ParallelConfig
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import shutdown_distributed
from engine.parallel.table import Rectangle
from engine.testing.distributed import join_ranks, run_ranks
from engine.testing.runs import read_records, run_config, write_conversations, write_dataset

STEPS = 20
TOLERANCES = {"loss": 1e-5, "gradient norm": 1e-4, "parameters": 1e-4}
_COMMON = {
    "model.init_std": 0.1,
    "optimizer.eps": 1e-4,
    "optimizer.clip_grad": 2.0,  # some steps are clipped, some are not
    "lr_schedule.kind": "constant",
    "train.eval_steps": 1,
}
Digests = dict[tuple[str, Rectangle], list[int]]


@dataclass(frozen=True)
class Problem:
    """A training problem: a preset, settings common to all layouts, as `section.key`, and the number of steps."""

    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS


@dataclass(frozen=True)
class Case:
    """A layout in which to train a problem; by default one process.

    Attributes:
        micro: sequences per microbatch.
        bucket_size: elements per gradient bucket; None: the engine's default.
        after: the case that trains the first half of the steps; None: this one trains all of them.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dp: int = 1
    micro: int = 1
    bucket_size: int | None = None
    after: "Case | None" = None

    @property
    def ranks(self) -> int:
        assert self.parallel.tp != "auto" and self.parallel.pp != "auto"
        return self.parallel.tp * self.parallel.pp * self.dp

    def __str__(self) -> str:
        given = {"dp": self.dp, **self.parallel.model_dump(exclude_defaults=True), "micro": self.micro}
        text = " ".join(f"{key}={value}" for key, value in given.items()).replace(", ", ",")
        return f"{self.after} then {text}" if self.after else text


@dataclass(frozen=True)
class Outcome:
    """The results of a case.

    Attributes:
        losses: loss of each step, then of each evaluation.
        parameters: logical tensors by name, fp32.
        torn: names of tensors for which two ranks had different bits for the same part.
    """

    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, Tensor]
    torn: list[str]


@dataclass(frozen=True)
class Deviation:
    """The largest relative deviations; for parameters, the relative L2 of the `worst` logical tensor."""

    loss: float
    grad_norm: float
    parameters: float
    worst: str

    def problems(self, tolerances: Mapping[str, float] = TOLERANCES) -> list[str]:
        """List what is out of tolerance, one line each."""
        found = {"loss": self.loss, "gradient norm": self.grad_norm, "parameters": self.parameters}
        return [
            f"{name} off by {value:.1e} (tolerance {tolerances[name]:.0e})" + f", {self.worst}" * (name == "parameters")
            for name, value in found.items()
            if not value <= tolerances[name]
        ]


def deviation(outcome: Outcome, reference: Outcome) -> Deviation:
    """Compute the deviation of `outcome` from `reference`. NaN counts as the largest."""
    assert outcome.parameters.keys() == reference.parameters.keys()
    names = list(reference.parameters)
    errors = torch.stack([_l2(outcome.parameters[name], reference.parameters[name]) for name in names])
    worst = int(errors.argmax())  # a NaN, if any
    return Deviation(
        _largest(outcome.losses, reference.losses),
        _largest(outcome.grad_norms, reference.grad_norms),
        errors[worst].item(),
        names[worst],
    )


def _l2(values: Tensor, expected: Tensor) -> Tensor:
    return (values.double() - expected.double()).norm() / expected.double().norm()


def _largest(values: Sequence[float], expected: Sequence[float]) -> float:
    wide = torch.tensor(expected, dtype=torch.float64)
    return ((torch.tensor(values, dtype=torch.float64) - wide).abs() / wide.abs()).max().item()


def measure(
    directory: Path,
    problem: Problem,
    cases: Sequence[Case],
    *,
    timeout_s: float = 300,
    device: str = "cpu",
    backend: str = "gloo",
) -> list[Outcome]:
    """Train all cases sequentially in one set of processes, in the empty `directory`.

    `backend` is that of `run_ranks` in `engine/testing/distributed.py`.

    Raises:
        RuntimeError: a case failed or hangs; the message names it and contains the traceback of the rank.
    """
    write_dataset(directory / "corpus")
    write_conversations(directory / "chats")
    problem = replace(problem, settings={**problem.settings, "run.device": device})
    segments = [segment for number, case in enumerate(cases) for segment in _segments(directory, number, problem, case)]
    ranks = max(segment.case.ranks for segment in segments)
    try:
        noted = run_ranks(ranks, _train_in_turn, segments, directory, backend, timeout_s=timeout_s)
    except RuntimeError as error:
        begun = [str(segment.case) for segment in segments if segment.config.run.dir.exists()]
        raise RuntimeError(f"{problem.preset}, the last case begun is {begun[-1:]}:\n{error}") from None
    torn: dict[Path, list[str]] = defaultdict(list)
    for number, segment in enumerate(segments):
        torn[segment.config.run.dir] += _torn([notes[number] for notes in noted if number in notes])
    runs = [run_directory(directory, number) for number in range(len(cases))]
    return [_outcome(run, problem.steps, torn[run]) for run in runs]


@dataclass(frozen=True)
class _Segment:
    """Steps of a case, trained by one call of `train`."""

    case: Case
    config: Config


def run_directory(directory: Path, number: int) -> Path:
    """The run directory of a case of `measure`, by its number."""
    return directory / f"run{number}"


def _segments(directory: Path, number: int, problem: Problem, case: Case) -> list[_Segment]:
    settings = {**_COMMON, "train.eval_interval": problem.steps // 2, **problem.settings}
    settings |= {"batch.micro": case.micro, "run.dir": run_directory(directory, number)}
    if problem.settings.get("task") == "sft":
        settings["data.train"] = settings["data.valid"] = [{"path": str(directory / "chats")}]
    settings |= {f"parallel.{key}": value for key, value in case.parallel.model_dump(exclude_defaults=True).items()}
    overrides = [f"--{key}={_as_yaml(value)}" for key, value in settings.items()]
    last = _Segment(case, run_config(directory, *overrides, preset=problem.preset, steps=problem.steps))
    if case.after is None:
        return [last]
    (first,) = _segments(directory, number, problem, case.after)
    half = first.config.train.model_copy(update={"steps": problem.steps // 2})
    return [replace(first, config=first.config.model_copy(update={"train": half})), last]


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _outcome(run: Path, num_steps: int, torn: list[str]) -> Outcome:
    records, checkpoint = read_records(run / "metrics.jsonl"), open_checkpoint(run)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, num_steps + 1))
    evaluations = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert len(evaluations) == 3  # before, half-way, at the end
    return Outcome(
        losses=[record["loss"] for record in steps] + evaluations,
        grad_norms=[record["grad_norm"] for record in steps],
        parameters={name: checkpoint.read(name) for name in checkpoint.tensors()},
        torn=torn,
    )


def _torn(notes: Sequence[Digests]) -> list[str]:
    """List the tensors for which two ranks recorded different digests of the same part."""
    seen: Digests = {}
    parts = (item for note in notes for item in note.items())
    return sorted({name for (name, where), digests in parts if seen.setdefault((name, where), digests) != digests})


def _train_in_turn(segments: Sequence[_Segment], directory: Path, backend: str) -> dict[int, Digests]:
    """Train the segments that use this rank, each in a new world; return the digests by segment."""
    rank = int(os.environ["RANK"])
    if dist.is_initialized():
        dist.barrier()  # no rank leaves while others still connect
        shutdown_distributed()
    gc.freeze()  # so that imported objects are not scanned after every run
    noted = {}
    for number, segment in enumerate(segments):
        ranks = segment.case.ranks
        if rank >= ranks:
            continue
        os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        if ranks > 1:
            join_ranks(backend, directory / f"store{number}", rank, ranks)
        noted[number] = _train(segment)
        gc.collect()  # process groups of the run hold threads and sockets
    return noted


def _train(segment: _Segment) -> Digests:
    made: list[_Watched] = []

    def build(*arguments: Any, **options: Any) -> _Watched:
        if segment.case.bucket_size is not None:
            options["bucket_size"] = segment.case.bucket_size
        made.append(_Watched(*arguments, **options))
        return made[0]

    with mock.patch.object(engine.train.step, "ShardedParameters", build), redirect_stdout(io.StringIO()):
        try:
            engine.train.run.train(segment.config)
        finally:
            if (
                torch.are_deterministic_algorithms_enabled()
            ):  # query first: setting it takes a second, even without a change
                torch.use_deterministic_algorithms(False)
    return made[0].digests


class _Watched(ShardedParameters):
    """Records a digest of its parameters when the gradients of a step are complete. By then every layer has waited
    for its parameters.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.digests: Digests = defaultdict(list)

    def reduce_gradients(self) -> None:
        for bucket in self.buckets:
            for slot in bucket.plan.slots:
                for tensor, offset in slot.tensors():
                    part = bucket.param[offset : offset + tensor.rectangle.size].cpu().view(torch.uint8)
                    self.digests[tensor.name, tensor.rectangle].append(xxhash.xxh3_64_intdigest(part.numpy().tobytes()))
        super().reduce_gradients()
