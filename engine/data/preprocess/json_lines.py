"""Parses JSON as found in datasets: also with NaN and Infinity, which Python and pandas write for missing numbers."""

import re
from typing import Any

import orjson

INVALID = b"\xff"  # a line that replaces a row that is not text; rejected because it is not valid UTF-8
_STRING_OR_NAN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|-?(?:NaN|Infinity)', re.DOTALL)


def parse_json(content: bytes) -> Any:
    """Parse a JSON value; NaN, Infinity and -Infinity become null.

    Raises:
        orjson.JSONDecodeError: it is not JSON otherwise.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        if b"NaN" not in content and b"Infinity" not in content:
            raise
    return orjson.loads(_STRING_OR_NAN.sub(_null, content))


def _null(found: re.Match[bytes]) -> bytes:
    return found[0] if found[0].startswith(b'"') else b"null"
