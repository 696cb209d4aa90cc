"""The format of token datasets: `PREFIX.bin` + `PREFIX.idx`, byte-compatible with Megatron-LM's IndexedDataset.

`.bin` contains the tokens of all documents, concatenated. `.idx` contains a header (magic, version, dtype code, n, d)
and three tables: sequence lengths int32 [n], byte offsets of the sequences int64 [n], and the first sequence of each
document int64 [d], with n as its last entry. Fine-tuning datasets also have a `PREFIX.mask.bin`: one byte per token, 1
if the token is a target, else 0. `PREFIX.json` describes the dataset (see `info.py`); `PREFIX.checksums` tells whether
it has changed (see `checksums.py`).

Legend: n sequences; d document indices, one more than documents.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.storage.files import CHUNK, CheckedFile

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, n, d
TOKEN_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}  # by code
MAX_SEQUENCE_LENGTH = (1 << 31) - 1  # lengths are int32


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of stored tokens: uint16 for vocabularies of fewer than 65,500 entries, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def dataset_file(prefix: Path | str, kind: str) -> Path:
    """Return the path `PREFIX.kind` (kinds: bin, idx, json, mask.bin, checksums); the prefix may contain dots."""
    return Path(f"{prefix}.{kind}")


def read_header(index: CheckedFile) -> tuple[np.dtype[Any], int, int]:
    """Read token dtype, n and d, and check the counts against the file size.

    Raises:
        DataFormatError: not the index of a token dataset.
    """
    index.expect(index.size >= HEADER.size, "size", f"{index.size} bytes", f"at least {HEADER.size}, a header")
    magic, version, code, n, d = HEADER.unpack(index.read(0, HEADER.size))
    index.expect(magic == MAGIC, "magic", magic, repr(MAGIC))
    index.expect(version == VERSION, "version", version, str(VERSION))
    index.expect(code in TOKEN_DTYPES, "dtype code", code, "1 .. 5 or 8")
    dtype = np.dtype(TOKEN_DTYPES[code])
    index.expect(dtype.kind in "iu", "dtype", dtype.name, "an integer type, as token ids are whole numbers")
    index.expect(d >= 1, "document count", d, "1 or more, as the table ends with the sequence count")
    size = HEADER.size + 12 * n + 8 * d
    expected = f"{size} ({size + n} with modes) for {n} sequences and {d} document indices"
    index.expect(index.size in (size, size + n), "size", f"{index.size} bytes", expected)
    return dtype, n, d


def chunks(count: int) -> Iterator[tuple[int, int]]:
    """Yield `[start, stop)` of the chunks of a table with `count` entries."""
    return ((start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
