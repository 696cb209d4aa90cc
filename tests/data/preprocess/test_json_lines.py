"""JSON with the numbers that Python and pandas write and JSON lacks."""

import json
import math

import orjson
import pytest

from engine.data.preprocess.json_lines import parse_json

VALUES = [
    {"text": "a", "score": math.nan},
    {"text": "b", "scores": [math.inf, -math.inf, 1.5], "deep": {"x": [math.nan]}},
    {"NaN": "NaN", "text": 'he said "NaN", \\\\ and \\"-Infinity\\"', "x": math.nan},
    [math.nan],
]


def without(value):
    """The value with null for what is not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without(item) for key, item in value.items()}
    return [without(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("value", VALUES)
def test_what_is_not_a_number_is_null(value):
    assert parse_json(json.dumps(value).encode()) == without(value)


@pytest.mark.parametrize("content", [b"{NaN: 1}", b'{"a": NaNa}', b'{"a": "NaN', b'{"a": +Infinity}', b"NaN NaN"])
def test_what_is_not_json_stays_so(content):
    with pytest.raises(orjson.JSONDecodeError):
        parse_json(content)


def test_a_string_cut_off_is_read_once():
    """A search that starts again at each of its quotes would take minutes."""
    with pytest.raises(orjson.JSONDecodeError):
        parse_json(b'{"score": NaN, "text": "' + rb"print(\"hello\")" * 20_000)
