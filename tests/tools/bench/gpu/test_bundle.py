"""The folder for a bare machine: wheels from a local folder, the library, NCCL; and its use there."""

import json
import lzma
import struct
import zipfile
from pathlib import Path

import pytest

from engine.errors import TriaxisError
from tools.bench.gpu import bundle, environment, library, nccl

ARCHS = (80, 90)


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0, 64, len(payload)).ljust(28, b"\0") + struct.pack("<I", arch)
    return header.ljust(64, b"\0") + payload


def fat_library() -> bytes:
    """Two fat binaries with machine code (2) and PTX (1), in between four bytes that look like one."""
    magic = struct.pack("<I", 0xBA55ED50)
    entries = [entry(2, arch, bytes([arch]) * 40) for arch in ARCHS] + [entry(1, 90, b"ptx " * 10)]
    body = b"".join(entries)
    fat = magic + struct.pack("<HHQ", 1, 16, len(body)) + body
    return b"ELF" + fat + magic + b"by chance..." + fat + b"end"


def test_only_the_wanted_machine_code_is_kept_and_offsets_stay():
    data = fat_library()
    result, kept = nccl.only_architectures(data, {90})
    assert len(result) == len(data)
    assert kept == 80
    assert result.count(bytes([90]) * 40) == 2
    assert bytes([80]) * 40 not in result
    assert b"ptx" not in result
    assert result.startswith(b"ELF")
    assert b"by chance" in result
    with pytest.raises(ValueError, match=r"no machine code for \[75\]"):
        nccl.only_architectures(data, {75})
    with pytest.raises(ValueError, match="not of the known layout"):
        nccl.only_architectures(data.replace(struct.pack("<IQ", 64, 40), struct.pack("<IQ", 8, 40)), {90})


def wheel(folder: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    stem = f"{name.replace('-', '_')}-99.0"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n"
    metadata += "".join(f"Requires-Dist: {other}\n" for other in requires)
    files = files | {
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in files) + f"{stem}.dist-info/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for path, content in (files | {f"{stem}.dist-info/RECORD": record.encode()}).items():
            archive.writestr(path, content)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A bundle made from local wheels, without a network and without a compiler."""
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.setattr(bundle, "required_packages", lambda: ["triaxis-fake-a>=2", "triaxis-fake-b"])
    monkeypatch.setattr(bundle, "FOR_TESTS", ())
    monkeypatch.setattr(bundle, "OPTIONAL", ("triaxis-fake-c", "triaxis-fake-liger"))
    monkeypatch.setattr(bundle, "NEEDS_ONLY_TORCH", ("triaxis-fake-liger",))
    monkeypatch.setattr(bundle, "NCCL", "triaxis-fake-nccl>=2.30")
    wheel(local, "triaxis-fake-a", {"fake_a.py": b"A = 1\n"}, ("triaxis-fake-d", "numpy"))
    wheel(local, "triaxis-fake-b", {"fake_b.py": b""})
    wheel(local, "triaxis-fake-c", {"fake_c.py": b""})
    wheel(local, "triaxis-fake-d", {"fake_d.py": b""})
    wheel(local, "triaxis-fake-liger", {"fake_liger.py": b""}, ("torch",))
    wheel(local, "numpy", {"numpy/__init__.py": b""})  # comes with PyTorch
    wheel(local, "triaxis-fake-nccl", {bundle.NCCL_FILE: fat_library()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(local))
    compiled = tmp_path / "_csrc.so"
    compiled.write_bytes(b"compiled")
    monkeypatch.setattr(library, "LIBRARY", compiled)
    monkeypatch.setattr(library, "find_nvcc", lambda: None)
    monkeypatch.setattr(bundle, "has_kernels", lambda: True)

    def make(*flags: str) -> Path:
        bundle.main([str(tmp_path / "bundle"), *flags])
        return tmp_path / "bundle"

    return make


def test_a_bundle_has_all_that_a_bare_machine_lacks_and_nothing_that_comes_with_torch(made, capsys):
    folder = made()
    names = sorted(path.name.partition("-")[0] for path in (folder / "wheels").iterdir())
    assert names == [f"triaxis_fake_{name}" for name in ("a", "b", "c", "d", "liger")]
    assert (folder / "_csrc.so").read_bytes() == b"compiled"
    description = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    assert description["required"] == ["triaxis-fake-a>=2", "triaxis-fake-b"]
    assert description["csrc_hash"] == library.csrc_hash()
    assert lzma.decompress((folder / "libnccl.so.2.xz").read_bytes()) == nccl.only_architectures(fat_library(), {90})[0]
    unpacked = nccl.unpacked(folder)
    assert unpacked is not None
    assert unpacked.name == "libnccl.so.2"
    assert len(unpacked.read_bytes()) == len(fat_library())
    assert f"MiB  {folder}" in capsys.readouterr().out


def test_what_can_be_left_out_and_how_large_it_may_be(made):
    folder = made("--without-nccl", "--without", "triaxis-fake-d")
    assert nccl.unpacked(folder) is None
    assert not list((folder / "wheels").glob("triaxis_fake_d*"))
    with pytest.raises(TriaxisError, match=r"more than --limit-mib 0\.0001; see --without"):
        made("--without-nccl", "--limit-mib", "0.0001")


def test_a_package_that_the_registry_lacks_is_named(made, monkeypatch):
    monkeypatch.setattr(bundle, "OPTIONAL", ("triaxis-fake-none",))
    with pytest.raises(TriaxisError, match="No matching distribution found for triaxis-fake-none"):
        made("--without-nccl")


def test_the_machine_installs_what_it_lacks_and_names_what_it_cannot(made, tmp_path, monkeypatch):
    folder = made("--without-nccl")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    monkeypatch.setenv("PIP_NO_DEPS", "1")  # into an empty folder numpy and torch would be dependencies that lack
    problems = environment.install(folder / "wheels", ["triaxis-fake-a>=2", "triaxis-fake-z"], ["triaxis-fake-liger"])
    assert (tmp_path / "site" / "fake_a.py").exists()
    assert (tmp_path / "site" / "fake_liger.py").exists()
    assert len(problems) == 1
    assert problems[0].startswith("pip install triaxis-fake-z: ")


def test_the_library_of_other_sources_is_not_taken(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "_csrc.so").write_bytes(b"bundled")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_csrc.so")
    monkeypatch.setattr(library, "find_nvcc", lambda: None)
    assert library.provide(folder, "another") == "missing, and no nvcc (the bundle's is of other sources)"
    assert library.provide(folder, library.csrc_hash()) == f"copied from {folder}"
    assert library.LIBRARY.read_bytes() == b"bundled"
    assert library.provide(None, None) == "there before, and no nvcc"
    built = []
    monkeypatch.setattr(library, "find_nvcc", lambda: Path("/cuda/bin/nvcc"))
    monkeypatch.setattr(library, "build", lambda: built.append(True))
    assert library.provide(folder, "another") == "built here (the bundle's is of other sources)"
    assert built == [True]


def test_what_is_required_is_what_the_package_requires():
    names = [name.partition(">")[0] for name in bundle.required_packages()]
    assert {"pydantic", "orjson", "pyyaml", "jinja2"} <= set(names)
    assert not {"torch", "numpy"} & set(names)
