"""Which files are read."""

from pathlib import Path

import pytest

from engine.data.preprocess.sources import RECORDS, find_sources
from engine.errors import ConfigError


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
        (
            ["empty"],
            r"no .jsonl or .txt or .parquet files below the directory empty; a pattern takes .json, .md, .rst, .py, as "
            r"in 'empty/\*\*/\*.py'$",
        ),
        (
            ["a.csv"],
            r"a.csv has an unknown suffix; expected .jsonl, .json, .txt, .* each also with .gz or .zst, or .parquet$",
        ),
        (["a.gz"], "a.gz has an unknown suffix"),
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
