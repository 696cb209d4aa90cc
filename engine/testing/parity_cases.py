"""Cases of the parity campaign: every grid with every schedule, sharded or not, and resumes in other layouts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from engine.config.schema import ParallelConfig
from engine.parallel.pipeline.schedules import INTERLEAVED, SCHEDULES
from engine.testing.parity import Case, Problem

Grid = tuple[int, int, int]  # tp, pp, dp
SIZES = (1, 2, 4)  # of each axis
PROBLEMS: dict[str, dict[str, Any]] = {
    "tiny": {"batch.global": 8, "train.z_loss": 1e-2},
    "tiny-qwen2": {"batch.global": 12},
    "tiny-qwen3": {"batch.global": 8, "data.document_mask": False},
    "tiny-starcoder2": {"batch.global": 12, "train.z_loss": 1e-3, "model.sliding_window": 12},
    "tiny-olmo2": {"batch.global": 8, "model.num_kv_heads": 1},
    "tiny-gemma2": {"batch.global": 12, "train.z_loss": 1e-3, "model.sliding_window": 12},
    "tiny-gemma3": {"batch.global": 8, "model.sliding_window": 12},
    "tiny-granite": {"batch.global": 12, "model.init_std": 0.15},  # or no step is clipped
    "tiny-phi3": {"batch.global": 8},
    "tiny-ministral": {"batch.global": 12, "model.sliding_window": 12},
}
# Microbatches per rank, by sequences per step and pipeline stages: multiples of the stages, and others. Fewer if data
# parallelism leaves fewer sequences.
MICROBATCHES = {8: {1: 2, 2: 4, 4: 4}, 12: {1: 2, 2: 3, 4: 6}}
RECOMPUTE: list[dict[str, Any]] = [
    {},
    {"recompute": "selective"},
    {"recompute": "full"},
    {"recompute": "full", "recompute_layers": 1},
]
SMALL_BUCKET = 10_000  # elements: about one bucket per layer


def grids(ranks: int) -> list[Grid]:
    """List all grids of these sizes with more than one and at most `ranks` ranks."""
    return [(tp, pp, dp) for tp in SIZES for pp in SIZES for dp in SIZES if 1 < tp * pp * dp <= ranks]


def plan_cases(presets: Sequence[str], ranks: int) -> list[tuple[Problem, list[Case]]]:
    """List the cases of each problem: every grid with every schedule, sharded or not, and resumes in another layout.

    Kinds of recomputation alternate, so that each combination runs with every kind in some of the families.
    """
    found: dict[tuple[str, int], list[Case]] = {}
    for family, preset in enumerate(presets):
        sequences = PROBLEMS[preset]["batch.global"]
        for number, (grid, options) in enumerate(_combinations(ranks)):
            recompute = RECOMPUTE[(number + family) % len(RECOMPUTE)]
            case = _case(grid, sequences, SMALL_BUCKET if number % 2 else None, **options, **recompute)
            found.setdefault((preset, 6 if "layers_per_stage" in options else 4), []).append(case)
        found[preset, 4] += [case for case in _resumes(sequences) if max(case.ranks, _ranks(case.after)) <= ranks]
    return [
        (Problem(preset, PROBLEMS[preset] | {"model.num_layers": layers}), cases)
        for (preset, layers), cases in found.items()
    ]


def _combinations(ranks: int) -> Iterator[tuple[Grid, dict[str, Any]]]:
    for grid in grids(ranks):
        _, pp, dp = grid
        for schedule in SCHEDULES if pp > 1 else ("1f1b",):
            parts: dict[str, Any] = {"virtual_stages": 2} if schedule == INTERLEAVED else {}
            if parts and pp == 4:  # 8 parts, more than the presets have layers
                parts["layers_per_stage"] = (0, 1, 1, 1, 1, 1, 1, 0)
            for sharded in (True, False) if dp > 1 else (True,):
                yield grid, {"schedule": schedule, "sharded_optimizer": sharded, **parts}


def _case(grid: Grid, sequences: int, bucket_size: int | None = None, **options: Any) -> Case:
    tp, pp, dp = grid
    share = sequences // dp
    micro = share // min(MICROBATCHES[sequences][pp], share)
    return Case(ParallelConfig(tp=tp, pp=pp, **options), dp, micro, bucket_size)


def _resumes(sequences: int) -> list[Case]:
    """Cases that train the second half of the steps in another layout than the first."""
    pairs = [
        (_case((4, 1, 2), sequences), _case((2, 2, 2), sequences, schedule="zero_bubble")),
        (_case((1, 1, 4), sequences, SMALL_BUCKET), _case((2, 4, 1), sequences)),
        (_case((2, 2, 1), sequences), _case((1, 1, 4), sequences)),
        (_case((1, 4, 1), sequences), _case((4, 1, 1), sequences)),
    ]
    return [replace(last, after=first) for last, first in pairs]


def _ranks(case: Case | None) -> int:
    return case.ranks if case else 1
