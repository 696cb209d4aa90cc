"""Which files are read."""

from pathlib import Path

import pytest

from engine.data.preprocess.sources import RECORDS, TEXTS, find_sources
from engine.errors import ConfigError


def test_directories_globs_and_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["d/b.jsonl", "d/a.txt", "d/sub/c.jsonl.gz", "d/z.txt.zst", "e.jsonl", "f.jsonl"]
    ignored = ["d/config.json", "d/readme.md", "d/old.rejects.jsonl", "d/data.csv.gz"]
    for name in [*names, *ignored]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    Path("d/folder.jsonl").mkdir()
    told = []
    found = [source.path for source in find_sources(["f.jsonl", "d", "[e].json*"], on_unread=told.append)]
    assert found == ["f.jsonl", "d/a.txt", "d/b.jsonl", "d/sub/c.jsonl.gz", "d/z.txt.zst", "e.jsonl"]
    assert told == [
        "d: 3 files of 8 not read (1 .json, 1 .csv, 1 .md); of a directory, .jsonl, .txt, .parquet, .arrow are read; "
        "name others, or give a pattern"
    ]
    assert [source.path for source in find_sources(["**/*.json"])] == ["d/config.json"]


def test_hidden_copies_do_not_count_twice(tmp_path, monkeypatch):
    """Those of notebooks, version control and download tools."""
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.txt", "d/.ipynb_checkpoints/a-checkpoint.txt", "d/.git/b/c.txt", "d/.hidden.txt", "d/LICENSE"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    told = []
    assert [source.path for source in find_sources(["d"], on_unread=told.append)] == ["d/a.txt"]
    assert len(told) == 1 and "d: 4 files of 5 not read (3 hidden, 1 without a suffix)" in told[0]
    monkeypatch.chdir(tmp_path / "d/.git")  # named itself, its files are read
    assert [source.path for source in find_sources(["b"])] == ["b/c.txt"]


def test_files_of_preprocessing_and_of_datasets_are_passed_over_without_a_word(tmp_path):
    written = ("x.v1_text.idx", "x.v1_text.bin", "x.v1_text.json", "x.v1_text.checksums", "x.rejects.jsonl")
    for name in ("a.jsonl", *written):
        (tmp_path / name).write_bytes(b"")
    for accepted in (TEXTS, RECORDS):
        found = find_sources([str(tmp_path)], accepted, pytest.fail)
        assert [Path(source.path).name for source in found] == ["a.jsonl"]


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
            r"no .jsonl or .txt or .parquet or .arrow files below the directory empty; a pattern takes .json, .csv, "
            r".tsv, .md, .rst, .py, as in 'empty/\*\*/\*.py'$",
        ),
        (
            ["a.doc"],
            r"a.doc has an unknown suffix; expected .jsonl, .json, .csv, .* each also with .gz, .zst, .bz2 or .xz, or "
            r".parquet or .arrow$",
        ),
        (["a.gz"], "a.gz has an unknown suffix"),
        (["a.jsonl", "./a.jsonl"], "twice"),
        (["a.jsonl", "b.jsonl"], "twice"),
    ],
)
def test_wrong_inputs(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.doc", "a.gz", "a.jsonl"):
        Path(name).write_bytes(b"")
    Path("b.jsonl").symlink_to("a.jsonl")
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_sources(inputs)
