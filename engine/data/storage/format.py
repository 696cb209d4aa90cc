"""Token datasets on disk: `PREFIX.bin` + `PREFIX.idx`, byte-compatible with Megatron-LM's IndexedDataset.

`.bin` holds the tokens of all documents, one after another. `.idx` holds a header (magic, version, dtype code, n, d)
and three tables: sequence lengths int32 [n], byte offsets of the sequences int64 [n], and the first sequence of each
document int64 [d], with n as its last entry. Fine-tuning datasets have a `PREFIX.mask.bin` too: one byte per token, 1
where the token is a target. `PREFIX.json` describes the dataset (see `info.py`).

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
    """The dtype of stored tokens: uint16 for fewer than 65,500 entries, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def dataset_file(prefix: Path | str, kind: str) -> Path:
    """`PREFIX.bin`, `.idx`, `.json` or `.mask.bin`; the prefix may itself contain dots."""
    return Path(f"{prefix}.{kind}")


def read_header(index: CheckedFile) -> tuple[np.dtype[Any], int, int]:
    """Token dtype, n and d; the counts are compared with the size of the file before any use.

    Raises:
        DataFormatError: this is no index of a token dataset.
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
    """`[start, stop)` of the chunks of a table with `count` entries."""
    return ((start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
