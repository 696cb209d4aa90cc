"""Formatting of durations, counts, sizes and suggestions."""

import difflib
from collections.abc import Iterable


def duration(seconds: float) -> str:
    """Format as `1d 02:03:04`, `2:03:04` or `3:04`."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{second:02}"
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def counted(number: int, noun: str, plural: str = "s") -> str:
    """Format as `1 file` or `1,024 files`; `plural` is the suffix of the plural."""
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def megabytes(num_bytes: float) -> str:
    """Format as `1,234.5 MB`, in units of 10^6 bytes."""
    return f"{num_bytes / 1e6:,.1f} MB"


def did_you_mean(name: str, known: Iterable[object]) -> str:
    """Format the known name that is closest to `name`, as ` (did you mean 'train'?)`; empty if none is close."""
    close = difflib.get_close_matches(name, [str(one) for one in known], n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""
