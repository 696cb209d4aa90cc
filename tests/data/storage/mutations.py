"""Change the files of a sealed dataset at random, and count what verification says.

python -m tests.data.storage.mutations --count 5000: on a small and a large dataset.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from engine.data.storage.checksums import SEALED_KINDS
from engine.data.storage.format import dataset_file
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import IndexedDatasetWriter
from engine.errors import DataFormatError
from tests.data.storage.raw import INFO

VOCAB_SIZE = INFO.vocab_size


def write_dataset(prefix: Path, num_documents: int) -> None:
    """Documents of 0 to 6 tokens, with masks and a description."""
    draw = np.random.default_rng(num_documents)
    lengths = draw.integers(0, 7, num_documents)
    with IndexedDatasetWriter(prefix, np.uint16, INFO, masked=True) as writer:
        writer.add_documents(draw.integers(0, VOCAB_SIZE, lengths.sum()), lengths, draw.random(lengths.sum()) < 0.5)


def mutated(draw: random.Random, content: bytes) -> bytes:
    """Valid-looking and wild changes: a byte, a bit, two places exchanged, a piece moved, the end cut or grown."""
    kind, result = draw.randrange(6), bytearray(content)
    at, other = draw.randrange(len(result)), draw.randrange(len(result))
    if kind == 0:
        result[at] = (result[at] + draw.choice([1, 2, -1])) % 256
    elif kind == 1:
        result[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        result[at], result[other] = result[other], result[at]
    elif kind == 3:
        size = draw.choice([2, 8, 64])
        result[at : at + size], result[other : other + size] = result[other : other + size], result[at : at + size]
    elif kind == 4:
        del result[-draw.choice([1, 2, 4, 8]) :]
    else:
        result += draw.randbytes(draw.choice([1, 2, 4, 8]))
    return bytes(result)


def outcome(prefix: Path) -> str:
    """What opening and verifying say: "refused", "accepted", or the name of another exception."""
    try:
        IndexedDataset(prefix).verify(VOCAB_SIZE)
    except DataFormatError:
        return "refused"
    except Exception as error:
        return type(error).__name__
    return "accepted"


def campaign(prefix: Path, count: int, kinds: tuple[str, ...], seed: int = 0) -> Counter[tuple[str, str]]:
    """Try `count` changes of each of the files, one at a time; count (kind, outcome)."""
    found: Counter[tuple[str, str]] = Counter()
    for kind in kinds:
        path, draw = dataset_file(prefix, kind), random.Random(f"{seed} {kind}")
        content = path.read_bytes()
        while found.total() < count * (kinds.index(kind) + 1):
            if (change := mutated(draw, content)) != content:
                path.write_bytes(change)
                found[kind, outcome(prefix)] += 1
        path.write_bytes(content)
    assert outcome(prefix) == "accepted"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="changes, over all files of the small dataset")
    parser.add_argument("--large", type=int, default=1000, help="changes of an index above 2^20 entries")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, documents, kinds, count in (
            ("small", 2000, (*SEALED_KINDS, "checksums"), options.count // 5),
            ("index", 2000, ("idx",), options.count),
            ("large", 1_200_000, ("idx",), options.large),
        ):
            start = time.monotonic()
            write_dataset(Path(folder, name), documents)
            found = campaign(Path(folder, name), count, kinds)
            print(f"{name}: {dict(found)} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
