"""Reading documents: every format, and everything that can be wrong with a file."""

import gzip
import os
from pathlib import Path

import orjson
import pytest
import zstandard

from engine.data.preprocess import blocks, decompress
from engine.data.preprocess.blocks import read_blocks
from engine.data.preprocess.documents import parse_block
from engine.data.preprocess.sources import RECORDS, find_sources
from engine.errors import ConfigError, StorageError

TEXTS = ["one", "two\nlines", "", "naïve 中文", "nul \x00 inside", "x" * 5000, " "]
LINES = b"".join(orjson.dumps({"id": i, "text": text}) + b"\n" for i, text in enumerate(TEXTS))
SURROGATES = b'{"text": "\\ud83d\\ude00"}'


def read(path, keys=("text",), block_bytes=blocks.BLOCK_BYTES):
    """Texts, and rejects as (line, reason)."""
    blocks = list(read_blocks(find_sources([str(path)]), block_bytes))
    parsed = [parse_block(block, keys) for block in blocks]
    rejects = [reject for _, found in parsed for reject in found]
    assert all(reject.file == str(path) for reject in rejects)
    return [text for found, _ in parsed for (text, *_) in found], [(r.line, r.reason) for r in rejects]


def compress(content, suffix):
    with_checksum = zstandard.ZstdCompressor(write_checksum=True).compress
    return {"": bytes, ".gz": gzip.compress, ".zst": with_checksum}[suffix](content)


@pytest.fixture(params=["", ".gz", ".zst"])
def suffix(request):
    return request.param


@pytest.mark.parametrize("block_bytes", [1, 20, 1 << 20])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path, name, suffix, block_bytes):
    path = tmp_path / (name + suffix)
    path.write_bytes(compress(LINES, suffix))
    assert read(path, block_bytes=block_bytes) == (TEXTS, [])


def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / ("a.txt" + suffix)
    path.write_bytes(compress("é\n\nb\n".encode() * 1000, suffix))
    assert read(path, block_bytes=10) == (["é\n\nb\n" * 1000], [])


@pytest.mark.parametrize("block_bytes", [1, 30, 1000])
def test_line_numbers_do_not_depend_on_blocks(tmp_path, block_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\nbad\r\n' * 50 + b"last")
    texts, rejects = read(path, block_bytes=block_bytes)
    assert texts == ["a"] * 50
    assert [line for line, _ in rejects] == [*range(3, 151, 3), 151]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"plain text", "not JSON"),
        (b'{"text": "a"', "not JSON: unexpected end"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'{"text": NaN}', "not JSON"),
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
    texts, rejects = read(path)
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
    assert read(path) == (texts, [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"ab\xff", "not UTF-8: byte 0xff at offset 2"), ("a".encode("utf-16"), "not UTF-8: byte 0xff at offset 0")],
)
def test_bad_text_files(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    assert read(tmp_path / "a.txt") == ([], [(1, reason)])


def test_quoted_text_is_short_and_printable(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff" + b"x" * 10_000)
    (block,) = read_blocks(find_sources([str(tmp_path / "a.jsonl")]))
    (reject,) = parse_block(block, ["text"])[1]
    assert reject.text == "\ufffd" + "x" * 199
    assert str(reject).startswith(f"{tmp_path}/a.jsonl:1: not JSON")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("block_bytes", [50, 1 << 20])
def test_truncated_compression_keeps_what_came_before(tmp_path, suffix, block_bytes):
    content = b"".join(orjson.dumps({"text": os.urandom(200).hex()}) + b"\n" for _ in range(200))
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (1, 5, 10_000):
        path.write_bytes(compress(content, suffix)[:-cut])
        texts, ((line, reason),) = read(path, block_bytes=block_bytes)
        assert reason == "truncated compressed file, left out from here on"
        assert line == len(texts) + 1
        assert all(f'"{text}"'.encode() in content for text in texts)
    path.write_bytes(b"")
    assert read(path) == ([], [(1, "truncated compressed file, left out from here on")])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compression(tmp_path, suffix):
    whole = bytearray(compress(b"".join(os.urandom(50).hex().encode() + b"\n" for _ in range(2000)), suffix))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"not compressed at all" * 10)
    assert "damaged" in read(path)[1][0][1]
    whole[len(whole) // 2 : len(whole) // 2 + 50] = bytes(50)
    path.write_bytes(whole)
    texts, rejects = read(path)
    assert texts == [] and len(rejects) == 1
    path.write_bytes(compress(b"good", suffix) + b"trailing garbage")
    assert "damaged" in read(path)[1][0][1]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_one_after_another(tmp_path, suffix):
    """As `cat a.gz b.gz` and parallel compressors make them; some pad with zeros."""
    path = tmp_path / f"a.jsonl{suffix}"
    one = compress(LINES, suffix)
    for glue in (b"", b"\0" * decompress.COMPRESSED_BYTES):
        path.write_bytes(one + glue + one + b"\0" * 512)
        assert read(path) == (TEXTS * 2, [])
    padding = decompress.COMPRESSED_BYTES - len(one)
    path.write_bytes(one + b"\0" * padding + one)  # the second starts where a reading ends
    assert read(path) == (TEXTS * 2, [])


def test_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_DOCUMENT_BYTES", 1 << 22)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' + b"x" * (1 << 23)))
    texts, ((line, reason),) = read(path)
    assert (texts, line) == (["a"], 2)
    assert "longer than 4,194,304 bytes" in reason


def test_several_keys(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "x", "b": "y"}\n{"a": "x"}\n')
    (block,) = read_blocks(find_sources([str(tmp_path / "a.jsonl")]))
    found, rejects = parse_block(block, ["b", "a"])
    assert found == [("y", "x")]
    assert "no key 'b'" in rejects[0].reason


def test_positions_end_at_the_size_of_all_files(tmp_path, suffix):
    paths = [tmp_path / f"{i}.jsonl{suffix}" for i in range(3)]
    for path in paths:
        path.write_bytes(compress(LINES * 40, suffix))
    sources = find_sources([str(tmp_path)])
    positions = [block.position for block in read_blocks(sources, 1000)]
    assert positions == sorted(positions)
    assert positions[-1] == sum(source.num_bytes for source in sources) == sum(p.stat().st_size for p in paths)


def test_directories_globs_and_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["d/b.jsonl", "d/a.txt", "d/sub/c.jsonl.gz", "d/z.txt.zst", "e.jsonl", "f.jsonl"]
    ignored = ["d/config.json", "d/readme.md", "d/old.rejects.jsonl", "d/data.csv.gz"]
    for name in [*names, *ignored]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    Path("d/folder.jsonl").mkdir()
    found = [source.path for source in find_sources(["f.jsonl", "d", "[e].json*"])]
    assert found == ["f.jsonl", "d/a.txt", "d/b.jsonl", "d/sub/c.jsonl.gz", "d/z.txt.zst", "e.jsonl"]
    assert [source.path for source in find_sources(["**/*.json"])] == ["d/config.json"]


def test_directories_of_records(tmp_path, monkeypatch):
    """Also .json, but for the description of a dataset that lies there."""
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.json", "d/b.json.gz", "d/c.jsonl", "d/x_sft.json", "d/x_sft.idx", "d/x.rejects.jsonl", "d/e.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    assert [source.path for source in find_sources(["d"], RECORDS)] == ["d/a.json", "d/b.json.gz", "d/c.jsonl"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["gone.jsonl"], "no such file or directory: gone.jsonl"),
        (["gone*.jsonl"], r"no such file or directory: gone\*"),
        (["empty"], "no .jsonl or .txt files below the directory empty"),
        (
            ["a.csv"],
            r"cannot tell what a.csv holds; expected .jsonl, .json, .txt, .md, .rst, .py, each also with .gz or .zst$",
        ),
        (["a.gz"], "cannot tell what a.gz holds"),
        (["a.jsonl", "./a.jsonl"], "twice"),
        (["a.jsonl", "b.jsonl"], "twice"),
    ],
)
def test_wrong_inputs(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "a.gz", "a.jsonl"):
        Path(name).write_bytes(b"")
    Path("b.jsonl").symlink_to("a.jsonl")
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_sources(inputs)


def test_a_file_that_vanishes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    sources = find_sources([str(path)])
    path.unlink()
    with pytest.raises(StorageError, match=r"cannot read .*a\.jsonl"):
        list(read_blocks(sources))
