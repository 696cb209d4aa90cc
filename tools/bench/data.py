"""Measure the cost of the first batch of a very large dataset: time, memory, disk.

    python tools/bench/data.py [--tokens 1e12] [--documents 1e7]

The dataset is a sparse file of zeros: its size is real, but only its index uses disk space.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from engine.config.schema import DatasetConfig
from engine.data.samples.pretrain import PretrainDataset
from engine.data.storage.format import HEADER, MAGIC, VERSION
from engine.errors import run_program

SEQ_LENGTH, BATCH = 4096, 1024


def main() -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description="Time to the first batch of a very large dataset.")
    parser.add_argument("--tokens", type=float, default=1e12, help="(default: 1e12)")
    parser.add_argument("--documents", type=float, default=1e7, help="(default: 1e7)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "large"
        write_sparse(prefix, int(options.tokens), int(options.documents))
        on_disk = sum(file.stat().st_blocks * 512 for file in Path(directory).iterdir())
        measure(prefix, on_disk)


def write_sparse(prefix: Path, tokens: int, documents: int) -> None:
    """Write a dataset of equally long documents whose tokens are a sparse file."""
    length = tokens // documents
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(length * documents * 2)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        np.full(documents, length, "<i4").tofile(file)
        (np.arange(documents, dtype="<i8") * (length * 2)).tofile(file)
        np.arange(documents + 1, dtype="<i8").tofile(file)


def measure(prefix: Path, on_disk: int) -> None:
    """Print the time to open the dataset and to its first batch, memory (MB), and the time of a sample (µs)."""
    before, started = resident_mb(), time.perf_counter()
    data = PretrainDataset([DatasetConfig(path=prefix)], (98, 1, 1), "train", SEQ_LENGTH, seed=1)
    opened = time.perf_counter() - started
    batch = [data.sample(i) for i in range(BATCH)]
    first = time.perf_counter() - started
    print(f"tokens                       {data.num_tokens:,} in the training part, {on_disk / 1e6:,.0f} MB on disk")
    print(f"opened                       {opened * 1e3:.1f} ms")
    print(f"first batch ({len(batch)} × {SEQ_LENGTH})    {first * 1e3:.1f} ms")
    grown, batch_mb = resident_mb() - before, BATCH * (SEQ_LENGTH + 1) * 8 / 1e6
    print(f"resident memory grew by      {grown:.0f} MB, {batch_mb:.0f} of them the batch")
    del batch
    for name, base in (("sample(0 ..)", 0), ("sample(10^11 ..)", 10**11)):
        times = [seconds(data, base + i) for i in range(2000)]
        print(f"{name:28} {statistics.median(times) * 1e6:.0f} µs (median of 2,000)")


def seconds(data: PretrainDataset, i: int) -> float:
    """Seconds to read sample `i`."""
    started = time.perf_counter()
    data.sample(i)
    return time.perf_counter() - started


def resident_mb() -> float:
    """Return the current resident memory of this process in MB; Linux only."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    run_program(main)
