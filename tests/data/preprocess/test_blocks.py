"""Files cut into blocks: line numbers, positions, lines without an end."""

import gzip

import pytest

from engine.data.preprocess import blocks
from engine.data.preprocess.blocks import read_blocks
from engine.data.preprocess.sources import find_sources
from engine.errors import StorageError
from tests.data.preprocess.examples import LINES, compress, read_documents


@pytest.mark.parametrize("block_bytes", [1, 30, 1000])
def test_line_numbers_do_not_depend_on_blocks(tmp_path, block_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\nbad\r\n' * 50 + b"last")
    texts, rejects = read_documents(path, block_bytes=block_bytes)
    assert texts == ["a"] * 50
    assert [line for line, _ in rejects] == [*range(3, 151, 3), 151]


def test_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_DOCUMENT_BYTES", 1 << 22)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' + b"x" * (1 << 23)))
    texts, ((line, reason),) = read_documents(path)
    assert (texts, line) == (["a"], 2)
    assert "longer than 4,194,304 bytes" in reason


def test_positions_end_at_the_size_of_all_files(tmp_path, suffix):
    paths = [tmp_path / f"{i}.jsonl{suffix}" for i in range(3)]
    for path in paths:
        path.write_bytes(compress(LINES * 40, suffix))
    sources = find_sources([str(tmp_path)])
    positions = [block.position for block in read_blocks(sources, 1000)]
    assert positions == sorted(positions)
    assert positions[-1] == sum(source.num_bytes for source in sources) == sum(p.stat().st_size for p in paths)


def test_a_file_that_vanishes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    sources = find_sources([str(path)])
    path.unlink()
    with pytest.raises(StorageError, match=r"cannot read .*a\.jsonl"):
        list(read_blocks(sources))
