"""Cases of several ranks for one device: each is compared with one rank on the same device.

They are small, so that ranks may share a GPU (`tests/gpu/test_ranks.py`), and the same cases run on a CPU
(`tests/testing/test_rank_cases.py`), where only the device differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.load import load_decoder
from engine.config.schema import ParallelConfig as Parallel
from engine.generate.decoding import Sampling, generate
from engine.parallel.layout import Layout
from engine.testing.distributed import run_ranks, world_of
from engine.testing.parity import TOLERANCES, Case, Outcome, Problem, deviation, measure, run_directory

_STEPS = 4
# Multiples of 128 for each of two ranks, as the FP8 matmuls of a GPU need them. The learning rate is one with which
# rounding does not grow from step to step.
_FP8 = {
    "precision.mode": "fp8",
    "model.init_std": 0.02,
    "model.num_layers": 2,
    "model.hidden_size": 256,
    "model.intermediate_size": 512,
    "model.head_dim": 64,
    "data.seq_length": 128,
    "batch.global": 4,
    "optimizer.lr": 1e-4,
}
RANK_PROBLEMS = {
    "fp32": Problem("tiny", {"batch.global": 8, "train.z_loss": 1e-2}, _STEPS),
    "packed": Problem("tiny", {"task": "sft", "batch.global": 8, "optimizer.lr": 1e-3}, _STEPS),
    **{
        recipe: Problem("tiny", {**_FP8, "precision.recipe": recipe}, _STEPS)
        for recipe in ("tensorwise", "delayed", "blockwise")
    },
}
_FP8_TOLERANCES = {"loss": 2e-3, "gradient norm": 3e-2, "parameters": 5e-3}
_SMALL_BUCKET = 10_000  # elements: about one bucket per layer


@dataclass(frozen=True)
class RankCase:
    """A layout for one of `RANK_PROBLEMS`."""

    problem: str
    case: Case

    @property
    def tolerances(self) -> Mapping[str, float]:
        return _FP8_TOLERANCES if self.problem in ("tensorwise", "delayed", "blockwise") else TOLERANCES


ONE = Case(micro=2)
"""The layout of the reference."""

RANK_CASES = {
    "tp 2": RankCase("fp32", Case(Parallel(tp=2), micro=4)),
    "pp 2, 1F1B": RankCase("fp32", Case(Parallel(pp=2), micro=1)),
    "pp 2, interleaved": RankCase("fp32", Case(Parallel(pp=2, schedule="interleaved", virtual_stages=2), micro=1)),
    "pp 2, zero bubble": RankCase("fp32", Case(Parallel(pp=2, schedule="zero_bubble"), micro=1)),
    "dp 2": RankCase("fp32", Case(dp=2, micro=2, bucket_size=_SMALL_BUCKET)),
    "dp 2, not sharded": RankCase("fp32", Case(Parallel(sharded_optimizer=False), dp=2, micro=2)),
    "tp 2 pp 2": RankCase("fp32", Case(Parallel(tp=2, pp=2), micro=2)),
    "FP8 tensorwise, tp 2": RankCase("tensorwise", Case(Parallel(tp=2), micro=2)),
    "FP8 delayed, tp 2": RankCase("delayed", Case(Parallel(tp=2), micro=2)),
    "FP8 blockwise, tp 2": RankCase("blockwise", Case(Parallel(tp=2), micro=2)),
    "FP8 tensorwise, dp 2, weights gathered in FP8": RankCase(
        "tensorwise", Case(Parallel(fp8_param_gather=True), dp=2, micro=2)
    ),
    "FP8 tensorwise, dp 2, gradients reduced in bf16": RankCase(
        "tensorwise", Case(Parallel(grad_reduce_dtype="bf16"), dp=2, micro=2)
    ),
    "pp 2, resumed with dp 2": RankCase("fp32", Case(dp=2, micro=2, after=Case(Parallel(pp=2), micro=2))),
    "packed fine-tuning, pp 2": RankCase("packed", Case(Parallel(pp=2), micro=2)),
    "packed fine-tuning, dp 2": RankCase("packed", Case(dp=2, micro=2)),
}


@dataclass(frozen=True)
class RankPlace:
    """Where cases run.

    Attributes:
        device: "cpu" or "cuda".
        backend: how several ranks communicate; see `run_ranks`.
        timeout_s: after which a case fails and shows the stacks of all ranks.
    """

    device: str
    backend: str
    timeout_s: float = 120


def train_case(directory: Path, problem: str, case: Case, place: RankPlace) -> Outcome:
    """Train a case in processes of its own, in the empty `directory`.

    Raises:
        RuntimeError: a rank failed, died or timed out.
    """
    device, backend = place.device, place.backend
    (outcome,) = measure(
        directory, RANK_PROBLEMS[problem], [case], timeout_s=place.timeout_s, device=device, backend=backend
    )
    return outcome


class References:
    """What one rank makes of each of `RANK_PROBLEMS` on a device; trained when it is first asked for."""

    def __init__(self, directory: Path, device: str) -> None:
        self.directory, self.place = directory, RankPlace(device, "gloo")
        self._outcomes: dict[str, Outcome] = {}

    def outcome(self, problem: str) -> Outcome:
        """Losses, gradient norms and parameters.

        Raises:
            RuntimeError: the rank failed, died or timed out.
        """
        if problem not in self._outcomes:
            (directory := self.directory / problem).mkdir()
            self._outcomes[problem] = train_case(directory, problem, ONE, self.place)
        return self._outcomes[problem]

    def run(self, problem: str) -> Path:
        """The run directory."""
        self.outcome(problem)
        return run_directory(self.directory / problem, 0)


def deviations_from_one(case: RankCase, outcome: Outcome, reference: Outcome) -> list[str]:
    """List where a case differs from one rank beyond rounding, or its ranks from each other.

    Ranks that gather weights in FP8 differ in the bf16 weights that they do not own, which no matmul reads.
    """
    found = deviation(outcome, reference).problems(case.tolerances)
    torn = [] if case.case.parallel.fp8_param_gather else outcome.torn
    return found + [f"ranks differ in {name}" for name in torn]


def generate_ids(run: Path, ranks: int, place: RankPlace) -> list[tuple[list[int], int]]:
    """Sample what continues a prompt, in fp32, with the model of a run on tensor-parallel ranks.

    Returns:
        The ids that each rank has sampled, and the number of parameters that it holds.

    Raises:
        RuntimeError: a rank failed, died or timed out.
    """
    arguments = (run, ranks, place.device)
    return run_ranks(ranks, _generate_on_rank, *arguments, timeout_s=place.timeout_s, backend=place.backend)


def _generate_on_rank(run: Path, ranks: int, device: str) -> tuple[list[int], int]:
    world = world_of(Layout(tp=ranks), device=device)
    decoder, tokenizer = load_decoder(run, torch.float32, world.device, world.tp)
    ids = generate(decoder, tokenizer.encode("abcabc"), 24, Sampling(temperature=1, top_p=0.9, seed=3))
    return list(ids), sum(parameter.numel() for parameter in decoder.parameters())
