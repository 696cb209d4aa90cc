"""A small model's worth of tensors, cut over ranks and saved by threads that meet at a barrier."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine.checkpoint.manifest import State
from engine.checkpoint.rectangles import flat_slice
from engine.checkpoint.save import FirstProblem, save
from engine.checkpoint.shares import StateSlice
from engine.checkpoint.storage import Storage
from engine.parallel.table import Rectangle

SHAPES = {"embed.weight": (33, 8), "layer.0.proj.weight": (16, 12), "norm.weight": (8,), "scale": ()}
KINDS = ("param", "exp_avg")
CONFIG = "model: {}\n"


def tensors(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of the model, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {(kind, name): torch.randn(shape, generator=generator) for kind in KINDS for name, shape in SHAPES.items()}


def state(step: int) -> State:
    return State(
        step=step,
        consumed_samples=step * 4,
        consumed_tokens=step * 64,
        data_fingerprint="data",
        layout={"dp": 2},
    )


def pieces(seed: int, rank: int, world_size: int) -> list[StateSlice]:
    """What `rank` owns when every tensor is cut flat into equal parts, as a sharded optimizer does."""
    owned = []
    for (kind, name), tensor in tensors(seed).items():
        whole = Rectangle((0,) * tensor.dim(), tuple(tensor.shape))
        begin, end = (tensor.numel() * r // world_size for r in (rank, rank + 1))
        flat = tensor.reshape(-1)[begin:end]
        for part in flat_slice(whole, begin, end):
            owned.append(StateSlice(kind, name, tuple(tensor.shape), part, flat[: part.size].reshape(part.extent)))
            flat = flat[part.size :]
    return owned


class Meeting:
    """`first_problem` for ranks that are threads."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.problems: list[str | None] = [None] * world_size

    def first_problem(self, rank: int) -> FirstProblem:
        def meet(problem: str | None) -> str | None:
            self.problems[rank] = problem
            self.barrier.wait()
            first = next((p for p in self.problems if p), None)
            self.barrier.wait()
            return first

        return meet


def save_step(
    run_dir: Path,
    step: int,
    *,
    world_size: int = 1,
    seed: int | None = None,
    keep_last: int = 3,
    owned: Callable[[int, int, int], Sequence[StateSlice]] = pieces,
    storages: Sequence[Storage | None] = (),
    tokenizer_files: Sequence[Path] = (),
    config_yaml: str = CONFIG,
) -> list[Path | BaseException]:
    """Save with `world_size` ranks; what each rank got, a path or an exception. One that dies breaks the connection."""
    meeting = Meeting(world_size)

    def run(rank: int) -> Path | BaseException:
        try:
            return save(
                run_dir,
                owned(step if seed is None else seed, rank, world_size),
                state(step),
                config_yaml=config_yaml,
                tokenizer_files=tokenizer_files,
                keep_last=keep_last,
                rank=rank,
                world_size=world_size,
                first_problem=meeting.first_problem(rank),
                storage=storages[rank] if storages else None,
            )
        except Exception as error:
            return error
        except BaseException as death:
            meeting.barrier.abort()
            return death

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
