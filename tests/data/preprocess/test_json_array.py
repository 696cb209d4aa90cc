"""JSON arrays cut into lines, wherever a chunk ends."""

import random

import orjson
import pytest

from engine.data.preprocess.decompress import Unreadable
from engine.data.preprocess.json_array import array_lines

ELEMENTS = [
    {"text": 'quotes " and \\ and ] } , [ {', "n": [1, [2, {"a": None}]]},
    "only a text, with a \\",
    {},
    [[], {}],
    -1.5e3,
    {"text": "line\nend and ünïcode 中", "\\": "\\\\"},
    None,
]


def chunked(content: bytes, size: int) -> "list[bytes]":
    return [content[i : i + size] for i in range(0, len(content), size)]


@pytest.mark.parametrize("indent", [0, orjson.OPT_INDENT_2])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_each_element_is_a_line_for_any_chunks(indent, size):
    for count in range(len(ELEMENTS) + 1):
        content = b" \n" + orjson.dumps(ELEMENTS[:count], option=indent) + b" \n"
        lines = list(array_lines(iter(chunked(content, size)), 1000))
        assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
        assert [orjson.loads(line) for line in lines] == ELEMENTS[:count]


def test_random_arrays():
    draw = random.Random(1)
    for _ in range(300):
        elements = [{"text": "".join(draw.choices('ab"\\[]{},\n ', k=draw.randrange(12)))} for _ in range(5)]
        content = orjson.dumps(elements, option=draw.choice([0, orjson.OPT_INDENT_2]))
        lines = array_lines(iter(chunked(content, draw.randrange(1, 9))), 1000)
        assert [orjson.loads(line) for line in lines] == elements


@pytest.mark.parametrize(
    ("content", "kept", "message"),
    [
        (b'[{"a": 1}, {"b": "x', 1, "no end"),
        (b'[{"a": 1}, {"b": 2}', 1, "no end"),
        (b'[{"a": 1}] {"b": 2}', 1, "content after the end of the JSON array"),
        (b'[{"a": 1}, "' + b"x" * 200 + b'"]', 1, "longer than 100 bytes"),
    ],
)
def test_damage_keeps_what_came_before(content, kept, message):
    lines = []
    with pytest.raises(Unreadable, match=message):
        lines.extend(array_lines(iter(chunked(content, 5)), 100))
    lines = []
    with pytest.raises(Unreadable, match=message):
        for line in array_lines(iter(chunked(content, 5)), 100):
            lines.append(line)
    assert len(lines) == kept


def test_a_line_end_inside_a_text_does_not_become_valid():
    """It is no JSON, so the element is rejected by the worker, and only that one."""
    lines = list(array_lines(iter([b'[{"a": "x\ny"}, {"a": 1}, {"b": NaN,\n"c": 2}]']), 1000))
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(lines[0])
    assert [orjson.loads(line) for line in lines[1:]] == [{"a": 1}, {"b": None, "c": 2}]
