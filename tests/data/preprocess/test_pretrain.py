"""Text files to datasets: the same bytes with any number of workers, all or nothing."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson
import pyarrow
import pytest
from pyarrow import parquet

from engine.data.preprocess import blocks
from engine.data.preprocess.build import Counts
from engine.data.preprocess.pretrain import dataset_prefix, preprocess
from engine.data.preprocess.sources import find_sources
from engine.data.preprocess.workers import WorkerFailed
from engine.data.storage.reader import IndexedDataset
from engine.data.tokenizers.byte import ByteTokenizer
from engine.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a small corpus is many blocks."""
    monkeypatch.setattr(blocks.read_blocks, "__defaults__", (500,))


@pytest.fixture
def corpus(tmp_path):
    """300 documents in three files, some empty, with two bad lines."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [f"document {i} " + "word " * (i % 17) if i % 50 else "" for i in range(300)]
    for number in range(3):
        part = texts[number * 100 : number * 100 + 100]
        lines = [orjson.dumps({"text": text, "title": f"t{text[:12]}"}) for text in part]
        if number:
            lines.insert(40, b"bad line %d" % number)
        (folder / f"{number}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder, texts


def run(folder, output, tokenizer=None, **options):
    settings = {"keys": ["text"], "append_eod": True, "workers": 1, **options}
    return preprocess(find_sources([str(folder)]), tokenizer or ByteTokenizer(), str(output), **settings)


def stored(output, key="text"):
    dataset = IndexedDataset(dataset_prefix(str(output), key))
    dataset.verify(dataset.info.vocab_size)
    starts = [dataset.document_start(j) for j in range(dataset.num_documents + 1)]
    return [dataset.tokens(a, b - a).tolist() for a, b in itertools.pairwise(starts)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_documents_in_order_each_with_its_end(tmp_path, corpus):
    folder, texts = corpus
    counts = run(folder, tmp_path / "out" / "a")
    assert stored(tmp_path / "out" / "a") == [[*text.encode(), 256] for text in texts if text]
    assert names(tmp_path / "out") == [
        "a.rejects.jsonl",
        *(f"a_text_document.{kind}" for kind in ("bin", "checksums", "idx", "json")),
    ]
    size = sum(path.stat().st_size for path in folder.iterdir())
    num_bytes = sum(map(len, texts))
    assert counts == Counts(294, num_bytes + 294, num_bytes, position=size, rejected=2, empty=6)


def test_documents_with_a_beginning(tmp_path, corpus):
    folder, texts = corpus
    tokenizer = ByteTokenizer()
    with pytest.raises(ConfigError, match="--prepend-bos: the tokenizer has no beginning-of-text token"):
        run(folder, tmp_path / "a", tokenizer, prepend_bos=True)
    tokenizer.bos_id = 1
    counts = run(folder, tmp_path / "a", tokenizer, prepend_bos=True)
    assert stored(tmp_path / "a") == [[1, *text.encode(), 256] for text in texts if text]
    assert counts.tokens == sum(len(text) + 2 for text in texts if text)


def test_without_ends(tmp_path, corpus):
    folder, texts = corpus
    run(folder, tmp_path / "a", append_eod=False)
    assert stored(tmp_path / "a") == [list(text.encode()) for text in texts if text]


def test_what_is_told_beside_the_data(tmp_path, corpus):
    folder, _ = corpus
    run(folder, tmp_path / "a")
    info = IndexedDataset(tmp_path / "a_text_document").info
    assert (info.tokenizer_kind, info.tokenizer_hash, info.vocab_size, info.eod_id) == ("byte", "byte", 257, 256)
    assert (info.num_documents, info.skipped) == (294, 2)
    assert [(source.path, source.bytes) for source in info.sources] == [
        (str(path), path.stat().st_size) for path in sorted(folder.iterdir())
    ]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(tmp_path, corpus, workers):
    folder, _ = corpus
    outputs = [tmp_path / "serial" / "x", tmp_path / "parallel" / "x"]
    counts = [run(folder, outputs[0]), run(folder, outputs[1], workers=workers)]
    assert counts[0] == counts[1]
    assert names(outputs[0].parent) == names(outputs[1].parent)
    for path in outputs[0].parent.iterdir():
        assert path.read_bytes() == (outputs[1].parent / path.name).read_bytes(), path.name


def test_several_keys(tmp_path, corpus):
    folder, texts = corpus
    run(folder, tmp_path / "a", keys=["title", "text"])
    assert stored(tmp_path / "a", "text") == [[*text.encode(), 256] for text in texts if text]
    assert stored(tmp_path / "a", "title") == [[*f"t{text[:12]}".encode(), 256] for text in texts]
    (tmp_path / "in" / "x.txt").write_text("a")
    with pytest.raises(ConfigError, match="plain text files have one text each"):
        run(folder, tmp_path / "b", keys=["title", "text"])


def test_rejects_are_kept_and_reported(tmp_path, corpus):
    folder, _ = corpus
    reported = []
    run(folder, tmp_path / "a", on_reject=reported.append)
    kept = [orjson.loads(line) for line in (tmp_path / "a.rejects.jsonl").read_bytes().splitlines()]
    assert [(item["file"], item["line"], item["text"]) for item in kept] == [
        (f"{folder}/1.jsonl", 41, "bad line 1"), (f"{folder}/2.jsonl", 41, "bad line 2"),
    ]  # fmt: skip
    assert [(reject.line, reject.text) for reject in reported] == [(41, "bad line 1"), (41, "bad line 2")]


def test_old_rejects_go_when_there_are_none(tmp_path, corpus):
    folder, _ = corpus
    run(folder, tmp_path / "a")
    run(folder / "0.jsonl", tmp_path / "a")
    assert not (tmp_path / "a.rejects.jsonl").exists()
    assert len(stored(tmp_path / "a")) == 98


@pytest.mark.parametrize("content", [b"", b"\n\n", b"bad\nworse\n", b'{"text": ""}\n'])
@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_to_train_on(tmp_path, content, workers):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"not a single token for key 'text' in .*a\.jsonl"):
        run(tmp_path / "a.jsonl", tmp_path / "out" / "a", workers=workers)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_leaves_nothing_behind(tmp_path, corpus, workers):
    folder, _ = corpus

    def stop(reject):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(folder, tmp_path / "out" / "a", workers=workers, on_reject=stop)
    assert names(tmp_path / "out") == []
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_old_dataset_survives_a_failure(tmp_path, corpus, workers):
    folder, _ = corpus
    run(folder, tmp_path / "out" / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError):
        run(folder, tmp_path / "out" / "a", workers=workers, tokenizer=Faulty("id", at="document 151"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


class Faulty(ByteTokenizer):
    """Does something terrible in the process that meets the text `at`."""

    def __init__(self, fault, at):
        super().__init__()
        self.fault, self.at = fault, at

    def encode_batch(self, texts):
        if not any(self.at in text for text in texts):
            return super().encode_batch(texts)
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raises":
            raise ValueError("in a worker")
        return [np.array([300])]


@pytest.mark.parametrize("at", ["document 1 ", "document 151", "document 299"])
def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path, corpus, at):
    folder, _ = corpus
    with pytest.raises(WorkerFailed, match="a worker process was killed") as caught:
        run(folder, tmp_path / "out" / "a", workers=2, tokenizer=Faulty("killed", at))
    assert caught.value.exit_code == 1
    assert names(tmp_path / "out") == []
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_workers_come_through(tmp_path, corpus, workers):
    folder, _ = corpus
    with pytest.raises((ValueError, WorkerFailed), match="in a worker"):
        run(folder, tmp_path / "out" / "a", workers=workers, tokenizer=Faulty("raises", "document 151"))
    with pytest.raises(DataError, match="gave id 300, but its vocabulary has 257"):
        run(folder, tmp_path / "out" / "a", workers=workers, tokenizer=Faulty("id", "document 151"))
    assert names(tmp_path / "out") == []


def test_no_orphans_when_the_parent_is_killed(tmp_path):
    """The parent waits for more input when it is killed; its workers must end by themselves."""
    os.mkfifo(tmp_path / "a.jsonl")
    program = (
        "import sys; from engine.data.preprocess import blocks, pretrain as p, sources;"
        "from engine.data.tokenizers.byte import ByteTokenizer;"
        "blocks.read_blocks.__defaults__ = (10,);"
        "p.preprocess(sources.find_sources(sys.argv[1:2]), ByteTokenizer(), sys.argv[2],"
        " keys=['text'], append_eod=True, workers=3)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a.jsonl"), str(tmp_path / "out")])
    with open(tmp_path / "a.jsonl", "wb", buffering=0) as pipe:
        pipe.write(b'{"text": "a"}\n' * 50)
        listing = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait_until(lambda: len(listing.read_text().split()) == 3)
        workers = listing.read_text().split()
        time.sleep(0.2)  # for the workers to have started watching
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(alive(worker) for worker in workers))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_parquet_is_read_as_lines_are(tmp_path):
    rows = [{"text": text, "id": i, "score": float("nan")} for i, text in enumerate(["one", "two", "", "naïve"])]
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([*rows, {"text": None}]), tmp_path / "in" / "a.parquet")
    counts = run(tmp_path / "in", tmp_path / "out")
    assert (counts.documents, counts.empty, counts.rejected) == (3, 1, 1)
    assert stored(tmp_path / "out") == [[*text.encode(), 256] for text in ("one", "two", "naïve")]
