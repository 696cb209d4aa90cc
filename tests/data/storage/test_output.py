"""One owner per output: refusal, leftovers, and two programs at once."""

import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from engine.data.storage.output import OutputOwner
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import IndexedDatasetWriter, seal
from engine.errors import ConfigError
from tests.data.storage.raw import some


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_writer_is_refused_and_the_first_undisturbed(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as first:
        first.add_document([1, 2])
        message = (
            rf"^process {os.getpid()} on .* is writing .*set; wait until it ends, or choose another output prefix$"
        )
        with pytest.raises(ConfigError, match=message), IndexedDatasetWriter(tmp_path / "set", np.uint16):
            raise AssertionError("there is an owner")
        with IndexedDatasetWriter(tmp_path / "set.v2", np.uint16) as other:  # another prefix, although a similar one
            other.add_document([9])
        first.add_document([3])
    assert IndexedDataset(tmp_path / "set").tokens(0, 3).tolist() == [1, 2, 3]
    assert names(tmp_path) == [
        f"set.{kind}" for kind in ("bin", "checksums", "idx", "v2.bin", "v2.checksums", "v2.idx")
    ]


def test_a_dataset_is_not_sealed_while_it_is_written(tmp_path):
    prefix = some(tmp_path)
    with pytest.raises(RuntimeError), IndexedDatasetWriter(prefix, np.uint16):
        with pytest.raises(ConfigError, match="is writing"):
            seal(prefix)
        raise RuntimeError
    seal(prefix)


def test_what_a_killed_owner_left_goes_with_the_next_one(tmp_path):
    for name in ("set.bin.0123abcd.partial", "set.lock", "set.v2.bin.0123abcd.partial", "set.bin.partial.txt"):
        (tmp_path / name).write_bytes(b"left")
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([1])
    kept = ["set.bin", "set.bin.partial.txt", "set.checksums", "set.idx", "set.v2.bin.0123abcd.partial"]
    assert names(tmp_path) == kept


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """A worker may still be busy when its parent has been killed and the user starts again."""
    ready, written = os.pipe()
    owner = os.fork()
    if owner == 0:
        held = OutputOwner(tmp_path / "lock", [])
        held.acquire()
        worker = os.fork()
        if worker:
            os.write(written, worker.to_bytes(8, "little"))
        time.sleep(60)
        os._exit(0)
    worker = int.from_bytes(os.read(ready, 8), "little")
    os.kill(owner, 9)
    os.waitpid(owner, 0)
    try:
        again = OutputOwner(tmp_path / "lock", [])
        again.acquire()
        again.release()
    finally:
        os.kill(worker, 9)


def test_a_lock_that_its_owner_removes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking it; others would lock the next file of this name."""
    flock = fcntl.flock

    def removed(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / "lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed)
    owner = OutputOwner(tmp_path / "lock", [])
    owner.acquire()
    with pytest.raises(ConfigError, match="is writing"):
        OutputOwner(tmp_path / "lock", []).acquire()
    owner.release()
    assert names(tmp_path) == []


def write(prefix, number, barrier, outcomes):
    barrier.wait()
    try:
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            for i in range(200):
                writer.add_document([number, i, i])
        outcomes.put("written")
    except Exception as error:
        outcomes.put(repr(error))


def test_of_writers_that_start_together_each_writes_all_or_is_refused(tmp_path):
    fork = multiprocessing.get_context("fork")
    contents = [np.array([[k, i, i] for i in range(200)], "<u2").tobytes() for k in range(4)]
    refused = 0
    for attempt in range(20):
        prefix, barrier, outcomes = tmp_path / str(attempt) / "set", fork.Barrier(4), fork.SimpleQueue()
        writers = [fork.Process(target=write, args=(prefix, k, barrier, outcomes)) for k in range(4)]
        for writer in writers:
            writer.start()
        found = [outcomes.get() for _ in writers]
        for writer in writers:
            writer.join()
        others = [outcome for outcome in found if outcome != "written"]
        assert len(others) < 4 and all("ConfigError" in outcome for outcome in others), found
        refused += len(others)
        IndexedDataset(prefix).verify(None)
        assert prefix.with_suffix(".bin").read_bytes() in contents
        assert names(prefix.parent) == ["set.bin", "set.checksums", "set.idx"]
    assert refused
