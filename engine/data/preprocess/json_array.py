"""Cuts a JSON array into lines, one per element, as its bytes arrive.

Memory is bounded by the longest element. The elements themselves are parsed by the workers, so that a damaged one is
rejected alone. Alternative considered: parsing the array at once, which takes several times its size.
"""

import re
from collections.abc import Iterator

import orjson

from engine.data.preprocess.decompress import Unreadable
from engine.data.preprocess.json_lines import parse_json

_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)  # up to a quote, or to a backslash at the very end
_STRUCTURE = re.compile(rb'["\[\]{},]')
_BAD = b"\x00"  # replaces a line end inside an element that is not JSON; no JSON contains it


def array_lines(chunks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield each element of an array as a line; `chunks` begin with blanks and its bracket.

    Raises:
        Unreadable: the array does not end, something follows it, or an element has more than `max_bytes`. The elements
            before have been yielded.
    """
    element, depth, in_string, escaped = bytearray(), 0, False, False
    for chunk in chunks:
        start = position = 0
        while position < len(chunk):
            if escaped:
                escaped, position = False, position + 1
            elif in_string:
                matched = _STRING.match(chunk, position)
                assert matched is not None, "it also matches nothing"
                position = matched.end()
                if position < len(chunk):
                    escaped = chunk[position] == ord("\\")
                    in_string, position = escaped, position + 1
            else:
                found = _STRUCTURE.search(chunk, position)
                position = found.end() if found else len(chunk)
                if found is None:
                    continue
                mark = found[0]
                in_string = mark == b'"'
                ends = depth == 1 and mark in (b",", b"]")
                depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
                if depth == 1 and mark == b"[":  # of the array
                    start = position
                elif ends:
                    element += chunk[start : position - 1]
                    start = position
                    if line := _as_line(bytes(element)):
                        yield line
                    element.clear()
                    if depth == 0:
                        _require_end(chunk[position:], chunks)
                        return
        element += chunk[start:]
        if len(element) > max_bytes:
            raise Unreadable(f"an element of the JSON array is longer than {max_bytes:,} bytes; the rest is skipped")
    raise Unreadable("the JSON array has no end; the rest after its last complete element is skipped")


def _as_line(element: bytes) -> bytes:
    """Return an element without line ends inside; empty if it is blank."""
    element = element.strip()
    if b"\n" in element:
        try:
            element = orjson.dumps(parse_json(element))
        except (orjson.JSONDecodeError, TypeError):  # no JSON, or nested too deeply
            element = element.replace(b"\n", _BAD)
    return element + b"\n" if element else b""


def _require_end(rest: bytes, chunks: Iterator[bytes]) -> None:
    for chunk in (rest, *chunks):
        if chunk.strip():
            raise Unreadable(f"content after the end of the JSON array, which is skipped: {chunk.strip()[:20]!r}")
