import errno
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash

from engine.checkpoint import storage as storage_module
from engine.checkpoint.safetensors_file import SafetensorsFile, file_hash
from engine.checkpoint.storage import Entry, Storage, new_directory, tensor_hash
from engine.errors import CheckpointError, StorageError
from engine.parallel.table import Rectangle


def entry(key: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Entry:
    return Entry(key, tuple(tensor.shape), dtype or tensor.dtype, lambda: [tensor])


TENSORS = {
    "odd": torch.randn(5).bfloat16(),
    "matrix": torch.randn(7, 3),
    "scalar": torch.tensor(2.5),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "longs": torch.arange(4),
}


def test_safetensors_reads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 16)
    path = tmp_path / "a.safetensors"
    written = Storage().write_safetensors(path, [entry(key, tensor) for key, tensor in TENSORS.items()])
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)
        assert written.hashes[key] == tensor_hash(tensor)
        assert written.hashes[key] == xxhash.xxh3_64_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy())
    assert written.file.size == path.stat().st_size
    assert written.file.xxh3_64 == file_hash(path) == xxhash.xxh3_64_hexdigest(path.read_bytes())


def test_data_start_aligned_and_are_plain_little_endian(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Storage().write_safetensors(path, [entry("a", torch.tensor([1.0, 2.0]))])
    content = path.read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert content[-8:] == bytes.fromhex("0000803f00000040")


def test_tensors_are_converted_while_they_are_written(tmp_path: Path) -> None:
    tensor = torch.randn(100)
    written = Storage().write_safetensors(tmp_path / "a", [entry("a", tensor, torch.bfloat16)])
    loaded = SafetensorsFile(tmp_path / "a")
    assert (loaded.names, loaded.dtype("a"), loaded.shape("a")) == (["a"], "BF16", (100,))
    assert torch.equal(loaded.tensor("a"), tensor.bfloat16())
    assert written.hashes["a"] == tensor_hash(tensor.bfloat16())


def test_a_slow_disk_writes_each_chunk_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread writes while the next chunks are converted."""
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 16)
    real_write = os.write

    def slow_write(fd: int, content: memoryview) -> int:
        time.sleep(0.001)
        return real_write(fd, content)

    monkeypatch.setattr(os, "write", slow_write)
    tensor = torch.arange(200.0)
    written = Storage().write_safetensors(tmp_path / "a", [entry("a", tensor, torch.bfloat16)])
    loaded = safetensors.torch.load_file(tmp_path / "a")["a"]
    assert torch.equal(loaded, tensor.bfloat16())
    assert written.hashes["a"] == tensor_hash(loaded)


def test_only_one_tensor_is_loaded_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []

    def load(key: str) -> list[torch.Tensor]:
        alive.append(key)
        assert (tmp_path / "a").stat().st_size >= 400 * (len(alive) - 2)
        return [torch.zeros(100)]

    Storage().write_safetensors(
        tmp_path / "a", [Entry(key, (100,), torch.float32, lambda key=key: load(key)) for key in ("x", "y", "z")]
    )
    assert alive == ["x", "y", "z"]


def test_operations_are_numbered_before_they_happen(tmp_path: Path) -> None:
    seen: list[tuple[int, str, str]] = []
    files = Storage(lambda number, name, path: seen.append((number, name, path.name)))
    files.make_directory(tmp_path / "d")
    files.write(tmp_path / "d" / "f", b"abc")
    files.rename(tmp_path / "d" / "f", tmp_path / "d" / "g")
    files.sync_directory(tmp_path / "d")
    assert files.read(tmp_path / "d" / "g") == b"abc"
    files.remove(tmp_path / "d")
    assert [number for number, _, _ in seen] == list(range(1, 9))
    assert [name for _, name, _ in seen] == [
        "make_directory", "create", "write", "sync", "rename", "sync_directory", "read", "remove",
    ]  # fmt: skip
    assert not (tmp_path / "d").exists()


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError):
        Storage().write(tmp_path / "f", b"other")
    assert (tmp_path / "f").read_text() == "mine"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real_write(fd, bytes(content[:3])))
    stored = Storage().write(tmp_path / "f", b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert stored.size == 10


def test_replace_text_leaves_the_old_text_when_it_fails(tmp_path: Path) -> None:
    def full(number: int, name: str, path: Path) -> None:
        if name == "write":
            raise OSError(errno.ENOSPC, "no space left")

    Storage().replace_text(tmp_path / "latest", "old")
    with pytest.raises(OSError, match="no space"):
        Storage(full).replace_text(tmp_path / "latest", "new")
    assert (tmp_path / "latest").read_text() == "old"
    Storage().replace_text(tmp_path / "latest", "newer")
    assert (tmp_path / "latest").read_text() == "newer"
    assert os.listdir(tmp_path) == ["latest"]


def raw(header: bytes, data: bytes = b"\0" * 8) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def described(start: int, end: int, shape: list[int]) -> bytes:
    return b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[%d,%d]}}' % (str(shape).encode(), start, end)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05",
        (100 << 20).to_bytes(8, "little") + b"{",  # header of 100 MB that is not there
        (1 << 62).to_bytes(8, "little") + b"{",
        raw(b"[" * 100_000),
        raw(b"not json"),
        raw(described(0, 1 << 50, [1 << 48])),
        raw(described(0, 8, [3])),
        raw(described(8, 0, [2])),
        raw(described(4, 8, [1])),
        raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        raw(b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'),
        raw(b'{"a":{"dtype":"Q7","shape":[2],"data_offsets":[0,8]}}'),
        b"\x80\x04cos\nsystem\n(S'echo'\ntR.",  # a pickle
    ],
)  # fmt: skip
def test_hostile_safetensors_are_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "evil.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"evil\.safetensors"):
        SafetensorsFile(tmp_path / "evil.safetensors")


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name, expected in [("pipe", "not a regular"), ("directory", "not a regular"), ("gone", "is missing")]:
        with pytest.raises(CheckpointError, match=expected):
            SafetensorsFile(tmp_path / name)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    Storage().write_safetensors(tmp_path / "a", [entry("a", torch.zeros(1))])
    with pytest.raises(CheckpointError, match="cannot read b: not there"):
        SafetensorsFile(tmp_path / "a").tensor("b")


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    Storage().write_safetensors(tmp_path / "a", [entry("a", torch.zeros(5000))])
    opened = SafetensorsFile(tmp_path / "a")
    os.truncate(tmp_path / "a", 9000)
    with pytest.raises(CheckpointError, match="ends too early"):
        opened.tensor("a")


def test_a_dtype_we_do_not_read_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="of dtype F8_E4M3"):
        SafetensorsFile(tmp_path / "a").tensor("a")


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path: Path) -> None:
    wrong = Entry("a", (3,), torch.float32, lambda: [torch.zeros(4)])
    with pytest.raises(ValueError, match=r"a: 16 bytes, expected 12 for shape \[3\]"):
        Storage().write_safetensors(tmp_path / "a", [wrong])


def test_a_rectangle_is_read_without_the_rows_around_it(tmp_path: Path) -> None:
    tensors = {"m": torch.arange(30.0).view(5, 6), "v": torch.arange(7.0), "s": torch.tensor(3.0)}
    safetensors.torch.save_file(tensors, tmp_path / "a")
    file = SafetensorsFile(tmp_path / "a")
    part = file.tensor("m", Rectangle((1, 2), (3, 4)))
    assert part.equal(tensors["m"][1:4, 2:6]) and part.untyped_storage().nbytes() == 3 * 6 * 4
    assert file.tensor("v", Rectangle((5,), (2,))).tolist() == [5, 6]
    assert file.tensor("s", Rectangle((), ())).item() == 3
    with pytest.raises(CheckpointError, match=r"m has shape \[5, 6\], wanted"):
        file.tensor("m", Rectangle((4, 0), (2, 6)))


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"), new_directory(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_begun_is_removed_when_it_fails(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left by a killed conversion").touch()
    with pytest.raises(type(error)), new_directory(tmp_path / "out") as partial:
        assert os.listdir(partial) == []
        (partial / "half").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []
