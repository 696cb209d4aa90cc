"""Shrinks libnccl.so.2 to the machine code of some architectures, so that it can travel: of 216 MB, xz leaves 39.

The library contains fat binaries: a header of 16 bytes, then entries (kind, header size, payload size, architecture).
The payloads of other architectures, and PTX, become zeros. Offsets stay, so the library loads as before.
"""

import lzma
import shutil
import struct
from collections.abc import Collection
from pathlib import Path

PACKED = "libnccl.so.2.xz"
_MAGIC, _HEADER_BYTES, _MACHINE_CODE = struct.pack("<I", 0xBA55ED50), 16, 2
_ARCH_OFFSET = 28  # in the header of an entry


def only_architectures(library: bytes, wanted: Collection[int]) -> tuple[bytearray, int]:
    """Zero the machine code of all but the `wanted` architectures (90: Hopper); return the library and what was kept.

    Raises:
        ValueError: another layout than this function knows, or no machine code for `wanted`.
    """
    data, at, kept = bytearray(library), 0, 0
    while (at := data.find(_MAGIC, at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        if header != _HEADER_BYTES or size > len(data) - at:  # these four bytes by chance
            at += len(_MAGIC)
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            kind, entry_header, payload = struct.unpack_from("<H2xIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + _ARCH_OFFSET)
            if not 32 <= entry_header <= 4096 or entry + entry_header + payload > end + 8:
                raise ValueError(f"a fat binary has an entry at {entry:#x} that is not of the known layout")
            if kind == _MACHINE_CODE and arch in wanted:
                kept += payload
            else:
                begin = entry + entry_header
                data[begin : begin + payload] = bytes(payload)
            entry += entry_header + payload
        at = end
    if not kept:
        raise ValueError(f"the library has no machine code for {sorted(wanted)}")
    return data, kept


def unpacked(bundle: Path) -> Path | None:
    """Unpack the bundle's library beside it, once; None if it has none."""
    packed, library = bundle / PACKED, (bundle / PACKED).with_suffix("")
    if packed.exists() and not library.exists():
        partial = library.with_suffix(".partial")
        with lzma.open(packed) as source, partial.open("wb") as output:
            shutil.copyfileobj(source, output)
        partial.rename(library)
    return library if library.exists() else None
