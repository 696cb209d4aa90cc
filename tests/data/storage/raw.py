"""Dataset files written field by field, without the writer."""

import struct
from pathlib import Path

from engine.data.storage.info import DatasetInfo

INTEGER_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
INFO = DatasetInfo(tokenizer_kind="byte", tokenizer_hash="b0", vocab_size=300, eod_id=0)


def index_bytes(lengths, documents, *, code=8, itemsize=2, modes=b"", pointers=None, version=1, n=None, d=None):
    """An index written field by field, as the format's table says."""
    if pointers is None:
        pointers = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    n, d = len(lengths) if n is None else n, len(documents) if d is None else d
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", version, code, n, d)
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
        + modes
    )


def put(folder: Path, index: bytes, data: bytes) -> Path:
    for name, content in ("set.idx", index), ("set.bin", data):
        (folder / name).unlink(missing_ok=True)  # rewriting in place is far slower on some file systems
        (folder / name).write_bytes(content)
    return folder / "set"


def some(folder: Path) -> Path:
    """Three sequences of 3, 0 and 2 tokens, each a document."""
    return put(folder, index_bytes([3, 0, 2], [0, 1, 2, 3]), struct.pack("<5H", 7, 8, 9, 10, 11))
