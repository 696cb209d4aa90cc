"""Makes the folder with all that a bare machine with PyTorch lacks: wheels, the compiled library, and NCCL.

    bash tools/bench/gpu.sh --make-bundle DIR [--python-version 3.12] [--arch 90] [--limit-mib 64]
        [--without grpcio pillow tensorboard] [--without-nccl]

Needs a package registry (pip's settings, such as PIP_NO_INDEX and PIP_FIND_LINKS, apply) and, for the kernels, nvcc.
PyTorch and what comes with it are left out. The folder goes to the machine beside the repository; gpu.sh takes it by
--bundle.
"""

import argparse
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import TriaxisError, run_program
from tools.bench.gpu import library
from tools.bench.gpu.nccl import PACKED, only_architectures
from tools.bench.kernel_table import git_commit

FOR_TESTS = ("pytest", "setuptools")
OPTIONAL = ("transformers", "liger-kernel")
NEEDS_ONLY_TORCH = ("liger-kernel",)  # resolving it would resolve PyTorch for another machine
NCCL, NCCL_FILE = "nvidia-nccl-cu13>=2.30", "nvidia/nccl/lib/libnccl.so.2"
COMES_WITH_TORCH = re.compile(r"torch|triton|numpy|nvidia-.*|cuda-.*")
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), "manylinux2014_x86_64")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see the module's docstring."""
    options = _arguments(arguments)
    folder: Path = options.folder
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    target = ["--only-binary", ":all:", "--python-version", options.python_version]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    required = [*required_packages(), *FOR_TESTS]
    resolved = _resolved([*required, *(name for name in OPTIONAL if name not in NEEDS_ONLY_TORCH)], target)
    pinned = [f"{name}=={version}" for name, version in resolved.items() if name not in options.without]
    _pip("download", "--no-deps", "--dest", str(wheels), *target, *pinned, *NEEDS_ONLY_TORCH)
    _add_library(folder)
    if not options.without_nccl:
        _add_nccl(folder, target, options.arch)
    description: dict[str, Any] = {"commit": git_commit(), "csrc_hash": library.csrc_hash()}
    description |= {"python": options.python_version, "required": required, "optional": list(OPTIONAL)}
    (folder / "bundle.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    _report(folder, options.limit_mib)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.sh --make-bundle", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--python-version", default="3.12", help="of the machine (default: 3.12)")
    parser.add_argument("--arch", type=int, default=90, help="whose machine code of NCCL is kept (default: 90, Hopper)")
    parser.add_argument("--without", nargs="+", default=(), metavar="PACKAGE", help="packages that the machine has")
    parser.add_argument("--without-nccl", action="store_true", help="ranks then send their messages through the host")
    parser.add_argument("--limit-mib", type=float, help="fail if the folder is larger")
    return parser.parse_args(arguments)


def required_packages() -> list[str]:
    """The requirements of pyproject.toml but PyTorch and NumPy."""
    text = (library.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [")[2].partition("]")[0]  # Python 3.10 has no parser of TOML
    return [name for name in re.findall(r'"([^"]+)"', block) if not re.match(r"(torch|numpy)\b", name)]


def _resolved(packages: Sequence[str], target: Sequence[str]) -> dict[str, str]:
    """Return the versions that pip would install, without those that come with PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--target", folder, "--report", str(report)]
        _pip("install", *options, *target, *packages)
        installs: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in installs}
    return {name: version for name, version in found.items() if not COMES_WITH_TORCH.fullmatch(name)}


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
        raise TriaxisError(f"pip {' '.join(arguments)}: {' '.join(errors)}")


def _add_library(folder: Path) -> None:
    origin = library.provide(None, None)
    if not has_kernels():
        raise TriaxisError(f"{library.LIBRARY} ({origin}) has no kernels for a GPU; install nvcc and start again")
    shutil.copy2(library.LIBRARY, folder / library.LIBRARY.name)


def has_kernels() -> bool:
    """Whether the library has kernels; in this process it is loaded here for the first time."""
    from engine.ops import native

    return native.has_kernels()


def _add_nccl(folder: Path, target: Sequence[str], arch: int) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        _pip("download", "--no-deps", "--dest", downloads, *target, NCCL)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            data, _ = only_architectures(archive.read(NCCL_FILE), {arch})
    with lzma.open(folder / PACKED, "wb", preset=6) as output:
        shutil.copyfileobj(io.BytesIO(data), output)


def _report(folder: Path, limit_mib: float | None) -> None:
    sizes = {path: path.stat().st_size / 2**20 for path in folder.rglob("*") if path.is_file()}
    for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:8.1f} MiB  {path.relative_to(folder)}")
    total = sum(sizes.values())
    print(f"{total:8.1f} MiB  {folder}")
    if limit_mib is not None and total > limit_mib:
        raise TriaxisError(f"{folder} has {total:.1f} MiB, more than --limit-mib {limit_mib:g}; see --without-nccl")


if __name__ == "__main__":
    run_program(main)
