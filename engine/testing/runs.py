"""Small training runs for tests: datasets, configuration, and training on real ranks."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from engine.checkpoint.opening import trained
from engine.config.load import resolve
from engine.config.schema import Config
from engine.data.samples.batch import Batch, collate
from engine.data.samples.sample import Sample
from engine.data.storage.format import token_dtype
from engine.data.storage.info import DatasetInfo
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import Interrupted
from engine.model.families import PRESETS
from engine.testing.distributed import run_ranks
from engine.train.run import train

CONVERSATIONS = (33, 20, 14, 4, 17, 17, 25, 9, 12, 11, 11, 22, 12, 5, 5, 16, 8, 10, 3, 9)
"""Lengths of twenty conversations in bytes; packed, they fill eight sequences of 32."""


def write_dataset(prefix: Path, *, num_documents: int = 60, seed: int = 0) -> Path:
    """Write documents of a few hundred bytes that a model can learn: each repeats a short random phrase."""
    random = np.random.default_rng(seed)
    info = _described()
    with IndexedDatasetWriter(prefix, token_dtype(info.vocab_size), info) as writer:
        for _ in range(num_documents):
            phrase = random.integers(97, 123, random.integers(3, 20))
            text = np.tile(phrase, 400 // len(phrase))[: random.integers(100, 400)]
            writer.add_document([*text.tolist(), info.eod_id])
    return prefix


def write_conversations(
    prefix: Path, lengths: Sequence[int] = CONVERSATIONS, *, seed: int = 0, chat_template: str | None = None
) -> Path:
    """Write conversations of these lengths. The second half of each repeats the first; its tokens are the targets."""
    random = np.random.default_rng(seed)
    info = _described(chat_template=chat_template)
    with IndexedDatasetWriter(prefix, token_dtype(info.vocab_size), info, masked=True) as writer:
        for length in lengths:
            half = random.integers(97, 107, length - length // 2)
            text = np.concatenate([half, half])[: length - 1]
            writer.add_document([*text.tolist(), info.eod_id], np.arange(length) >= half.size)
    return prefix


def _described(**fields: Any) -> DatasetInfo:
    tokenizer = load_tokenizer("byte")
    return DatasetInfo(
        tokenizer_kind=tokenizer.kind,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        **fields,
    )


def run_config(directory: Path, *overrides: str, preset: str = "tiny", steps: int = 10) -> Config:
    """Return the configuration of a run of a few seconds in `directory`, which contains a dataset `corpus`."""
    raw: dict[str, Any] = {
        "run": {"dir": str(directory / "run"), "device": "cpu"},
        "model": {"preset": preset},
        "precision": {"mode": "fp32"},
        "ops": {"measure": False},
        "data": {
            "tokenizer": "byte",
            "train": [{"path": str(directory / "corpus")}],
            "split": [80, 20, 0],
            "seq_length": 32,
            "num_workers": 0,
        },
        "batch": {"micro": 1, "global": 4},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": steps},
        "log": {"interval": 1, "tensorboard": False},
    }
    return resolve(raw, overrides, presets=PRESETS, source="test", trained=trained)


def random_batches(config: Config, *, dp_rank: int = 0, dp_size: int = 1) -> list[Batch]:
    """Return one step's microbatches of random tokens for a data-parallel rank; the same tokens in every layout."""
    length, micro = config.data.seq_length, config.batch.micro
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.model.vocab_size, (config.batch.global_, length + 1), generator=generator).numpy()
    share = config.batch.global_ // dp_size
    starts = range(dp_rank * share, (dp_rank + 1) * share, micro)
    samples = [Sample.following(row, np.empty(0, dtype=np.int64)) for row in tokens]
    return [collate(samples[i : i + micro], tuple(range(i, i + micro)), document_mask=False) for i in starts]


def run_training(config: Config, world_size: int = 1) -> list[dict[str, Any]]:
    """Train on real ranks and return the records of `metrics.jsonl`.

    Raises:
        RuntimeError: a rank failed; the message contains its traceback.
    """
    run_ranks(world_size, train, config)
    return read_records(config.run.dir / "metrics.jsonl")


def run_until_signal(
    config: Config, world_size: int, step: int, number: int = signal.SIGTERM, rank: int = 0
) -> list[str]:
    """Train, and signal `rank` once `step` is recorded; return each rank's reason for stopping."""
    return run_ranks(world_size, _train_and_signal, config, step, number, rank)


def _train_and_signal(config: Config, step: int, number: int, rank: int) -> str:
    def watch() -> None:
        while not any(record["step"] >= step for record in read_records(config.run.dir / "metrics.jsonl")):
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    if int(os.environ["RANK"]) == rank:
        signal.signal(number, signal.SIG_DFL)  # which nohup and background jobs of a shell ignore
        threading.Thread(target=watch, daemon=True).start()
    try:
        train(config)
    except Interrupted as error:
        return str(error)
    return "finished"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file, without an incomplete last line; empty if the file does not exist."""
    if not path.exists():
        return []
    return [orjson.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def losses(records: list[dict[str, Any]]) -> list[float]:
    """The losses of `read_records`, in the order of the file, without records that have none."""
    return [record["loss"] for record in records if "loss" in record]
