"""Compare fine-tuning with packing, without it, and with TRL's SFTTrainer: target tokens/s on the same conversations.

All variants start from one exported Hugging Face directory and train all parameters of a small Llama in fp32 on the
CPU. The conversations are random tokens with long-tailed lengths, tokenized beforehand; about half of the tokens are
targets. A step reads all of them, so that every variant does the same work: the losses of the first step must agree. A
round runs one step of each variant, so that other load on the machine affects all equally; compare the ratios.

    python tools/bench/sft.py --rounds 5
    python tools/bench/sft.py --others trl --python ../other-venv/bin/python

`--others trl` measures TRL, installed in the environment of --python, in three ways: `padded` (microbatches of 4
conversations of similar lengths, each padded to its longest; the more conversations in a step, the less padding),
`single` (one conversation per microbatch: no padding, and its fastest on a CPU) and `packed` (packing_strategy="bfd";
transformers' mask for SDPA keeps conversations apart). tools/bench/others/sft_trl.py has its settings.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, TextIO

import numpy as np
import torch

from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.manifest import State
from engine.checkpoint.opening import initial_weights, trained
from engine.checkpoint.run_directory import open_checkpoint
from engine.checkpoint.save import save
from engine.config.load import resolve
from engine.config.schema import Config, DatasetConfig, OptimizerConfig
from engine.data.samples.batch import Batch
from engine.data.samples.loader import batches
from engine.data.samples.sft import SftDataset
from engine.data.storage.files import Array
from engine.data.storage.format import token_dtype
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError, TriaxisError, run_program
from engine.model.families import PRESETS
from engine.model.parameters import logical_shapes
from engine.ops.measured import processor_name
from engine.parallel.layout import init_distributed
from engine.train.state import restore_weights, state_slices
from engine.train.step import build_model, train_step

SEQ_LENGTH = 1024
MEDIAN_LENGTH, SPREAD = 160, 1.0  # of the log-normal conversation lengths, in tokens
MODEL: dict[str, Any] = {
    "num_layers": 6, "hidden_size": 256, "intermediate_size": 688, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64,
    "vocab_size": 8192, "max_position": SEQ_LENGTH,
    "init_std": 0.1,  # large, so that a token's loss depends on its context
}  # fmt: skip
OURS, REFERENCE = ("triaxis, packed", "triaxis, padded"), "triaxis, packed"
OTHERS, MODES = Path(__file__).parent / "others", ("padded", "single", "packed")
TOLERANCE, TOLERANCE_OF_OTHERS = 1e-5, 1e-3  # relative, for the first losses


@dataclass(frozen=True)
class Step:
    """An optimizer step over all conversations: number of positions (including padding), and of targets among them."""

    seconds: float
    loss: float
    places: int
    targets: int


Side = Callable[[], Step]


@dataclass(frozen=True)
class Conversations:
    """Concatenated tokens, their target mask, and the length of each conversation."""

    ids: Array
    targets: Array
    lengths: Array

    @property
    def num_pairs(self) -> int:
        """Number of predictable tokens: all but the first of each conversation."""
        return int((self.lengths - 1).sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    conversations = make_conversations(options.conversations)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as processes:
        folder = Path(temporary)
        _write(folder, conversations)
        sides = {name: _ours(folder, packed=name == REFERENCE) for name in OURS}
        for other in options.others:
            for mode in MODES:
                sides[f"{other}, {mode}"] = processes.enter_context(_other(other, mode, options, folder))
        _describe(conversations, options.threads)
        first = {name: step() for name, step in sides.items()}  # warmup
        require_same_work(first)
        rounds: dict[str, list[Step]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, step in sides.items():
                rounds[name].append(step())
    for line in table(rounds, first, conversations.num_pairs):
        print(line)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed steps per variant, after an untimed one")
    parser.add_argument("--conversations", type=int, default=32, help="conversations per step")
    parser.add_argument("--threads", type=int, default=1, help="threads per variant")
    parser.add_argument("--others", nargs="+", choices=("trl",), default=[], metavar="PROJECT")
    parser.add_argument("--python", default="python", help="interpreter of the environment of the other projects")
    options = parser.parse_args(arguments)
    for name in ("rounds", "conversations", "threads"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: expected 1 or more")
    return options


def make_conversations(count: int) -> Conversations:
    """Generate random conversations of up to 4 user and assistant turns of equal length; assistant tokens are targets.

    The lengths are quantiles of a log-normal distribution, so that even a few conversations have its long tail.
    """
    random = np.random.default_rng(0)
    shares = (random.permutation(count) + 0.5) / count
    lengths = np.array([exp(NormalDist(log(MEDIAN_LENGTH), SPREAD).inv_cdf(share)) for share in shares])
    lengths = lengths.astype(int).clip(16, SEQ_LENGTH)
    turns = 2 * random.integers(1, 5, count)
    targets = [np.arange(length) * many // length % 2 for length, many in zip(lengths, turns, strict=True)]
    return Conversations(random.integers(0, MODEL["vocab_size"], lengths.sum()), np.concatenate(targets), lengths)


def _write(folder: Path, conversations: Conversations) -> None:
    """Write the inputs of all variants: a dataset for ours, JSON for others, and the initial weights."""
    with IndexedDatasetWriter(folder / "data", token_dtype(MODEL["vocab_size"]), masked=True) as writer:
        writer.add_documents(conversations.ids, conversations.lengths, conversations.targets)
    ends = np.cumsum(conversations.lengths)[:-1]
    columns = {"ids": conversations.ids, "targets": conversations.targets}
    lists = {name: [part.tolist() for part in np.split(values, ends)] for name, values in columns.items()}
    (folder / "conversations.json").write_text(json.dumps(lists), encoding="utf-8")
    config = _config(folder, MODEL, rows=1, packed=True)
    _, optimizer = build_model(config, init_distributed("cpu"), torch.float32, seed=0)
    save(
        folder / "run",
        state_slices(optimizer),
        State(0, 0, 0, "", {}),
        config_yaml=config.to_yaml(),
        tokenizer_files=[],
        keep_last=1,
        rank=0,
        world_size=1,
        first_problem=lambda problem: problem,
    )
    checkpoint, tokenizer = open_checkpoint(folder / "run"), load_tokenizer("byte")
    export(checkpoint, tokenizer, folder / "hf", logical_shapes(config.model), dtype=torch.float32)


def _config(folder: Path, model: dict[str, Any], *, rows: int, packed: bool) -> Config:
    raw: dict[str, Any] = {
        "task": "sft",
        "model": model,
        "data": {
            "tokenizer": "byte",
            "train": [{"path": str(folder / "data")}],
            "split": [1, 0, 0],
            "seq_length": SEQ_LENGTH,
            "packing": packed,
        },
        "batch": {"micro": 1, "global": rows},
        "train": {"steps": 1},
    }
    return resolve(raw, presets=PRESETS, source="the benchmark", trained=trained)


def _ours(folder: Path, *, packed: bool) -> Side:
    """Run the step of `engine train` on all conversations, including data loading."""
    datasets = [DatasetConfig(path=folder / "data")]
    data = SftDataset(datasets, (1, 0, 0), "train", SEQ_LENGTH, seed=0, packed=packed)
    config = _config(folder, {"from_hf": str(folder / "hf")}, rows=data.num_rows, packed=packed)
    model, optimizer = build_model(config, init_distributed("cpu"), torch.float32, seed=None)
    weights = initial_weights(config.model)
    assert weights is not None
    restore_weights(optimizer, weights)
    optimizer.broadcast_params()
    steps = enumerate(_batches(config, data), 1)

    def step() -> Step:
        started = time.perf_counter()
        number, microbatches = next(steps)
        targets = sum(batch.num_tokens for batch in microbatches)
        result = train_step(model, optimizer, microbatches, step=number, lr=config.optimizer.lr, tokens=targets)
        loss = result.loss.item()
        return Step(time.perf_counter() - started, loss, data.num_rows * SEQ_LENGTH, targets)

    return step


def _batches(config: Config, data: SftDataset) -> Iterator[list[Batch]]:
    return batches(
        data,
        first_sample=0,
        num_samples=None,
        global_batch_size=config.batch.global_,
        micro_batch_size=config.batch.micro,
        dp_rank=0,
        dp_size=1,
        document_mask=config.data.document_mask,
        num_workers=0,
        pin_memory=False,
    )


@contextmanager
def _other(project: str, mode: str, options: argparse.Namespace, folder: Path) -> Iterator[Side]:
    """Run another project in a separate process, which waits while others compute and ends when its stdin closes."""
    flags: dict[str, Any] = {"model": folder / "hf", "conversations": folder / "conversations.json", "mode": mode}
    flags |= {"seq-length": SEQ_LENGTH, "lr": OptimizerConfig().lr, "threads": options.threads}
    command = [options.python, str(OTHERS / f"sft_{project}.py")]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    log = folder / f"{project}-{mode}.log"
    with log.open("w", encoding="utf-8") as errors, _start(command, errors, options) as process:
        assert process.stdin is not None and process.stdout is not None
        requests, answers = process.stdin.fileno(), process.stdout

        def step() -> Step:
            with suppress(BrokenPipeError):  # the missing answer is reported instead
                os.write(requests, b"\n")
            for line in answers:
                if line.startswith("{"):
                    return Step(**json.loads(line))
                if line.startswith(project):
                    print(f"{project}, {mode}: {line}", end="", flush=True)
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ConfigError(f"--others {project} with --python {options.python} gave no result: {last}")

        yield step


def _start(command: list[str], errors: TextIO, options: argparse.Namespace) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, env=environment, text=True)
    except OSError as error:
        raise ConfigError(f"--python {options.python}: {error.strerror}; name an interpreter") from None


def require_same_work(first: dict[str, Step]) -> None:
    """Raise TriaxisError unless all variants have the same targets, and the same loss before the first update."""
    expected = first[REFERENCE]
    for name, step in first.items():
        if step.targets != expected.targets:
            raise TriaxisError(f"{name} has {step.targets} targets, but {REFERENCE} has {expected.targets}")
        tolerance = TOLERANCE if name in OURS else TOLERANCE_OF_OTHERS
        if not abs(step.loss - expected.loss) <= tolerance:
            raise TriaxisError(f"{name} has first loss {step.loss}, but {REFERENCE} has {expected.loss}")


def _describe(conversations: Conversations, threads: int) -> None:
    lengths, targets = conversations.lengths, conversations.targets
    print(f"{processor_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(
        f"{MODEL['num_layers']} layers, hidden {MODEL['hidden_size']}, vocabulary {MODEL['vocab_size']}, sequence "
        f"{SEQ_LENGTH}, fp32, {threads} thread(s)\na step is {lengths.size} conversations of {lengths.min()} to "
        f"{lengths.max()} tokens, median {np.median(lengths):.0f}, mean {lengths.mean():.0f}; {targets.mean():.0%} of "
        "the tokens are targets",
        flush=True,
    )


def table(rounds: dict[str, list[Step]], first: dict[str, Step], tokens: int) -> Iterator[str]:
    """Format one line per variant: median tokens/s (slowest – fastest) and the fraction of positions with a token."""
    medians = {name: median(step.seconds for step in steps) for name, steps in rounds.items()}
    yield (
        f"\n{'':16} {'target tokens/s':>24} {'tokens/s':>9} {'places':>8} {'full':>6} {'padding':>8} "
        f"{'first loss':>11} {REFERENCE} is"
    )
    for name, steps in rounds.items():
        targets, seconds, places = steps[0].targets, [step.seconds for step in steps], first[name].places
        speeds = f"{targets / medians[name]:,.0f} ({targets / max(seconds):,.0f} – {targets / min(seconds):,.0f})"
        shares = f"{tokens / places:6.1%} {1 - tokens / places:8.1%}"
        loss, ratio = first[name].loss, medians[name] / medians[REFERENCE]
        yield f"{name:16} {speeds:>24} {tokens / medians[name]:9,.0f} {places:8,} {shares} {loss:11.6f} {ratio:.2f}×"


if __name__ == "__main__":
    run_program(main)
