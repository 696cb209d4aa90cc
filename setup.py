"""Builds csrc into engine/_csrc.so: C++ always, CUDA where there is nvcc. The rest is in pyproject.toml.

Settings, from the environment:
    TRIAXIS_CUDA=auto|on|off   on: an error where kernels cannot be built; auto (the default): kernels where nvcc is
    TRIAXIS_CUDA_ARCHS=90a;80+PTX   what to compile for
    CXX, CUDA_HOME             the compilers

Without a C++ compiler or without torch's headers nothing is built, and the engine takes its plain PyTorch paths.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from csrc.build import DEFAULT_ARCHS, BuildError, Toolchain, build_library, find_nvcc  # noqa: E402


class BuildCsrc(build_ext):
    """Builds csrc as the extension `engine._csrc`, without CUDA or not at all where compilers are missing."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python in it: the same file serves every version

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("TRIAXIS_CUDA", "auto")
        if wanted not in ("auto", "on", "off"):
            raise SystemExit(f"TRIAXIS_CUDA={wanted}: expected auto, on or off")
        try:
            tools = _toolchain(wanted)
            build_library(tools, ROOT / "build" / "csrc", output)
        except BuildError as error:
            raise SystemExit(f"csrc: {error}\nTRIAXIS_CUDA=off builds it without CUDA") from error
        except LookupError as error:
            if wanted == "on":
                raise SystemExit(f"TRIAXIS_CUDA=on, and csrc cannot be built: {error.args[0]}") from error
            output.unlink(missing_ok=True)
            print(f"csrc is not built: {error.args[0]}; the engine takes its plain PyTorch paths", file=sys.stderr)


def _toolchain(wanted: str) -> Toolchain:
    cxx = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if cxx is None:
        raise LookupError("no C++ compiler (CXX, g++ or c++)")
    nvcc = None if wanted == "off" else find_nvcc()
    if wanted == "on" and nvcc is None:
        raise LookupError("no nvcc (CUDA_HOME, /usr/local/cuda or PATH)")
    return Toolchain(cxx, _torch(), nvcc, os.environ.get("TRIAXIS_CUDA_ARCHS", DEFAULT_ARCHS))


def _torch() -> Path:
    """The folder of torch: of this interpreter, or of the environment behind pip's isolated one."""
    spec = importlib.util.find_spec("torch")
    folders = [*(spec.submodule_search_locations or [] if spec else [])]
    folders += [os.path.join(sysconfig.get_paths()[name], "torch") for name in ("purelib", "platlib")]
    for folder in folders:
        if os.path.exists(os.path.join(folder, "include", "torch", "csrc", "stable", "library.h")):
            return Path(folder)
    raise LookupError("torch is not installed here; install it first, then this package again")


setup(ext_modules=[Extension("engine._csrc", sources=[], optional=True)], cmdclass={"build_ext": BuildCsrc})
