"""Compiles csrc into one library, with as many compilers at once as there are cores.

The name of an object contains a hash of its source, of every header and of the flags, so that it is compiled only once.
Alternatives considered: torch's CUDAExtension (it insists on the CUDA version that torch was built with, and its
headers take ten times as long), and CMake (one more tool to install, for a dozen files).
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_ARCHS = "90a;80+PTX"
_TORCH_TARGET = "0x020b000000000000"  # the oldest torch that the binary runs with: 2.11


class BuildError(Exception):
    """A compiler failed."""


@dataclass(frozen=True)
class Toolchain:
    """The compilers. `nvcc` is None if there is none, or if CUDA is switched off."""

    cxx: str
    torch: Path
    nvcc: Path | None = None
    archs: str = DEFAULT_ARCHS

    @property
    def cuda(self) -> Path | None:
        return None if self.nvcc is None else self.nvcc.parent.parent


def find_nvcc() -> Path | None:
    """CUDA's compiler: of CUDA_HOME or CUDA_PATH, else of /usr/local/cuda, else on PATH; None if there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [Path(home) / "bin" / "nvcc" for home in [*homes, "/usr/local/cuda"]]
    on_path = shutil.which("nvcc")
    candidates = [*found, *([Path(on_path)] if on_path else [])]
    return next((path.resolve() for path in candidates if path.is_file()), None)


def build_library(tools: Toolchain, directory: Path, output: Path) -> None:
    """Writes `output`: the operators, with the kernels if there is nvcc. Raises: BuildError."""
    jobs = kernel_jobs(tools) if tools.nvcc else []
    flags, named = ["-DTRIAXIS_CUDA"] if tools.nvcc else [], [f'-DTRIAXIS_BUILD="{_describe(tools)}"']
    for source in _cxx_sources(HERE, ("bind", "gemm")):
        jobs.append((source, _cxx_command(tools, [*flags, *(named if source.stem == "status" else [])])))
    objects = compile_objects(jobs, directory)
    libraries = [f"-L{tools.cuda}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"] if tools.cuda else []
    _link(tools, objects, libraries, output)


def _describe(tools: Toolchain) -> str:
    """What the library is built with; `triaxis --version` prints it."""
    compilers = [f"{Path(tools.cxx).name} {run([tools.cxx, '-dumpfullversion', '-dumpversion']).strip()}"]
    if tools.nvcc is None:
        return f"operators, without CUDA kernels ({compilers[0]})"
    release = re.search(r"release [\d.]+, V([\d.]+)", run([str(tools.nvcc), "--version"]))
    compilers.insert(0, f"nvcc {release[1] if release else 'of unknown version'}")
    return f"CUDA kernels for {tools.archs} ({', '.join(compilers)})"


def kernel_jobs(tools: Toolchain) -> list[tuple[Path, list[str]]]:
    """Kernel files and their nvcc commands. `compile_objects` writes ptxas reports to a .txt next to each object."""
    return [(source, _nvcc_command(tools)) for source in kernel_sources(HERE)]


def kernel_sources(root: Path) -> list[Path]:
    """The .cu files below `root`, a copy of csrc, in a fixed order."""
    return sorted(path for folder in ("kernels", "gemm") for path in (root / folder).glob("*.cu"))


def build_emulated(tools: Toolchain, directory: Path, output: Path, root: Path = HERE) -> None:
    """Writes `output`: the same operators for CPU tensors, over kernels that run on the host; for tests.

    It needs CUDA's headers. `root` is csrc or a copy of it.
    """
    assert tools.cuda is not None
    flags = ["-DTRIAXIS_EMULATED", "-O1", "-U_FORTIFY_SOURCE", f"-isystem{tools.cuda}/include", "-x", "c++"]
    sources = [
        *kernel_sources(root),
        *_cxx_sources(root, ("bind",)),
        root / "emulation" / "cuda.cpp",
    ]
    objects = compile_objects([(source, _cxx_command(tools, flags)) for source in sources], directory)
    _link(tools, objects, [], output)


def compile_objects(jobs: Sequence[tuple[Path, list[str]]], directory: Path) -> list[Path]:
    """The objects of (source, command), in that order; the source and the output are appended to the command."""
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: _compile(job[0], job[1], directory), jobs))


def _compile(source: Path, command: list[str], directory: Path) -> Path:
    root = source.parent.parent
    headers = sorted(path for path in root.rglob("*") if path.suffix in (".h", ".cuh"))
    digest = hashlib.sha256("\0".join(command).encode())
    for path in [source, *headers]:
        digest.update(path.read_bytes())
    target = directory / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        report = run([*command, "-c", str(source), "-o", str(unfinished)])
        target.with_suffix(".txt").write_text(report, encoding="utf-8")
        unfinished.rename(target)
    return target


def run(command: Sequence[str]) -> str:
    """Runs a command and returns what it printed. Raises: BuildError: it failed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def _cxx_sources(root: Path, folders: Sequence[str]) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).glob("*.cpp"))


def _cxx_command(tools: Toolchain, flags: Sequence[str]) -> list[str]:
    includes = [f"-isystem{tools.torch}/include"]
    return [tools.cxx, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
            f"-DTORCH_TARGET_VERSION={_TORCH_TARGET}", *includes, *flags]  # fmt: skip


def _nvcc_command(tools: Toolchain) -> list[str]:
    codes = []
    for arch in tools.archs.split(";"):
        number, _, ptx = arch.partition("+")
        kind = "compute" if ptx else "sm"
        codes.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return [str(tools.nvcc), "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v",
            "--expt-relaxed-constexpr", *codes]  # fmt: skip


def _link(tools: Toolchain, objects: Sequence[Path], libraries: Sequence[str], output: Path) -> None:
    unfinished = output.with_suffix(f".{os.getpid()}")
    torch_libraries = [f"-L{tools.torch}/lib", "-ltorch", "-ltorch_cpu"]
    run([tools.cxx, "-shared", *map(str, objects), *torch_libraries, *libraries, "-o", str(unfinished)])
    unfinished.rename(output)
