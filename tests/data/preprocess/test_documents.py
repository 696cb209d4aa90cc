"""Documents of blocks: every format, and everything that can be wrong with a line."""

import orjson
import pyarrow
import pytest

from engine.data.preprocess.blocks import read_blocks
from engine.data.preprocess.documents import parse_block
from engine.data.preprocess.sources import find_sources
from tests.data.preprocess.examples import LINES, TEXTS, compress, read_documents

SURROGATES = b'{"text": "\\ud83d\\ude00"}'


@pytest.mark.parametrize("block_bytes", [1, 20, 1 << 20])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path, name, suffix, block_bytes):
    path = tmp_path / (name + suffix)
    path.write_bytes(compress(LINES, suffix))
    assert read_documents(path, block_bytes=block_bytes) == (TEXTS, [])


def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / ("a.txt" + suffix)
    path.write_bytes(compress("é\n\nb\n".encode() * 1000, suffix))
    assert read_documents(path, block_bytes=10) == (["é\n\nb\n" * 1000], [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"plain text", "not JSON"),
        (b'{"text": "a"', "not JSON: unexpected end"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'{"text": NaN}', "key 'text' holds a NoneType, expected text"),
        (b"{'text': 'a'}", "not JSON"),
        (b'{"text": "\xff\xfe"}', "not JSON: str is not valid UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "UTF-8"),  # a surrogate, as some tools write it
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a\\udc00"}', "surrogate"),
        (b'{"text": "a\x00b"}', "control character"),
        (b"\x00" * 100, "not JSON"),  # what a crash leaves in a file
        (b"[" * 100_000, "depth"),
        (b'{"a":' * 100_000, "depth"),
        (b'{"text":' + b"9" * 5000 + b"}", "not JSON: number"),
        ("\ufeff".encode() + b'{"text": "a"}', "BOM"),  # not at the start of the file
        (b'{"text": "a"}'.decode().encode("utf-16"), "not JSON"),
        (b"null", "a JSON NoneType, expected an object"),
        (b'["text"]', "a JSON list, expected an object"),
        (b'"text"', "a JSON str, expected an object"),
        (b"{}", "no key 'text'; it has none"),
        (b'{"prompt": "a", "output": "b"}', "no key 'text'"),  # one key of two formats each
        (b'{"Text": "a", "url": 1}', "no key 'text'; it has 'Text', 'url'"),
        (b'{"messages": []}', "it has 'messages'; for fine-tuning preprocess it with task = sft"),
        (b'{"instruction": "a", "output": "b"}', "'output'; for fine-tuning preprocess it with task = sft"),
        (b'{"text": null}', "holds a NoneType, expected text"),
        (b'{"text": 5}', "holds a int, expected text"),
        (b'{"text": ["a"]}', "holds a list, expected text"),
    ],
)
def test_bad_lines(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    texts, rejects = read_documents(path)
    assert texts == ["before", "after"]
    assert [number for number, _ in rejects] == [2]
    assert reason in rejects[0][1]
    assert ("task = sft" in rejects[0][1]) == ("task = sft" in reason)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"", []),
        (b"\n \n\r\n\t\n", []),
        ("\ufeff".encode() + b'{"text": "a"}\n', ["a"]),
        (b'{"text": "a"}\r\n{"text": "b"}', ["a", "b"]),
        (SURROGATES, ["😀"]),
        (b'{"text": "a", "text": "b"}', ["b"]),
        (b'{"text": "nul \\u0000"}', ["nul \x00"]),
        (b'{"text": "\xe2\x80\xa8"}\n', ["\u2028"]),  # a line break for Python, not for JSON lines
    ],
)
def test_odd_but_right_files(tmp_path, content, texts):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert read_documents(path) == (texts, [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"ab\xff", "not UTF-8: byte 0xff at offset 2"), ("a".encode("utf-16"), "not UTF-8: byte 0xff at offset 0")],
)
def test_bad_text_files(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_documents(tmp_path / "a.txt") == ([], [(1, reason)])


def test_quoted_text_is_short_and_printable(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff" + b"x" * 10_000)
    (block,) = read_blocks(find_sources([str(tmp_path / "a.jsonl")]))
    (reject,) = parse_block(block, ["text"])[1]
    assert reject.text == "\ufffd" + "x" * 199
    assert str(reject).startswith(f"{tmp_path}/a.jsonl:1: not JSON")


def test_several_keys(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "x", "b": "y"}\n{"a": "x"}\n')
    (block,) = read_blocks(find_sources([str(tmp_path / "a.jsonl")]))
    found, rejects = parse_block(block, ["b", "a"])
    assert found == [("y", "x")]
    assert "no key 'b'" in rejects[0].reason


def test_tables_of_text(tmp_path, suffix):
    """Quotes, line ends in fields, rows of another length, bytes that are not UTF-8, a byte order mark."""
    rows = b'id,text\r\n1,"a ""b"", c"\r\n2,"two\nlines"\n\n3\n4,\xff\n5,na\xc3\xafve\xe2\x80\xa8end\n6,"unclosed'
    path = tmp_path / f"a.csv{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + rows, suffix))
    texts, rejects = read_documents(path, block_bytes=20)
    assert texts == ['a "b", c', "two\nlines", "naïve\u2028end"]
    assert [line for line, _ in rejects] == [3, 4, 6]
    assert "not CSV after row" in rejects[2][1] and "a JSON str, expected an object" in rejects[0][1]
    path = tmp_path / f"a.tsv{suffix}"
    path.write_bytes(compress(b"text\tid\na, b\t1\n", suffix))
    assert read_documents(path) == (["a, b"], [])


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
def test_arrow_files_and_streams(tmp_path, kind, block_bytes):
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": TEXTS * 3})
    make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    assert read_documents(path, block_bytes=block_bytes) == (TEXTS * 3, [])
    content = path.read_bytes()
    for cut in (len(content) // 2, len(content) - 8):  # the second takes only the mark of the end
        path.write_bytes(content[:cut])
        texts, ((line, reason),) = read_documents(path)
        assert texts == (TEXTS * 3)[: len(texts)] and line == len(texts) + 1
        assert "damaged Arrow file" in reason or "without its end mark" in reason


def test_a_json_array_of_documents(tmp_path, suffix):
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes(compress(orjson.dumps([{"text": text} for text in TEXTS], option=orjson.OPT_INDENT_2), suffix))
    assert read_documents(path, block_bytes=50) == (TEXTS, [])
