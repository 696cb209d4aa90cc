"""Builds csrc into engine/_csrc.so, and wheels whose names say what is in them. The rest is in pyproject.toml.

Settings, from the environment:
    TRIAXIS_CUDA=auto|on|off   on: an error where kernels cannot be built; auto (the default): kernels where nvcc is
    TRIAXIS_CUDA_ARCHS=90a;80+PTX   what to compile for
    CXX, CUDA_HOME             the compilers

    triaxis-VERSION-1cuda-py3-none-PLATFORM.whl   operators and CUDA kernels
    triaxis-VERSION-0cpu-py3-none-PLATFORM.whl    operators without kernels: no nvcc, or TRIAXIS_CUDA=off
    triaxis-VERSION-py3-none-any.whl              neither: no C++ compiler or no torch; the engine takes its plain
                                                  PyTorch paths
pip prefers the first of these. Every wheel holds the recipes of examples/configs/ and the commit it was built from.
"""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit("error: building needs setuptools 77 or newer: pip install -U setuptools")
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from csrc.build import DEFAULT_ARCHS, BuildError, Toolchain, build_library, find_nvcc  # noqa: E402
from engine.cli.version import COMMIT_FILE, commit  # noqa: E402

RECIPES = "examples/configs"


class BuildCsrc(build_ext):
    """Builds csrc as the extension `engine._csrc`, without CUDA or not at all where compilers are missing."""

    def run(self) -> None:
        print(describe_build(), file=sys.stderr)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python in it: the same file serves every version

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        tools, _ = toolchain()
        if tools is None:
            output.unlink(missing_ok=True)
            return
        try:
            build_library(tools, ROOT / "build" / "csrc", output)
        except BuildError as error:
            raise SystemExit(f"csrc: {error}\nTRIAXIS_CUDA=off builds it without CUDA") from error


class BuildPackage(build_py):
    """Adds the recipes and the commit to the package; an editable install finds both in the checkout."""

    def run(self) -> None:
        super().run()
        if toolchain()[0] is None:  # build_ext is not run, see PlatformDistribution
            print(describe_build(), file=sys.stderr)
        if not self.editable_mode:
            package = Path(self.build_lib) / "engine"
            shutil.copytree(ROOT / RECIPES, package / "recipes", dirs_exist_ok=True)
            (package / COMMIT_FILE).write_text(commit(), encoding="ascii")


class SourceWithCommit(sdist):
    """Writes the commit into the source distribution, which has no .git."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / "engine" / COMMIT_FILE).write_text(commit(), encoding="ascii")


class NamedWheel(bdist_wheel):
    """A wheel whose name says what csrc it holds: see above."""

    def finalize_options(self) -> None:
        tools, _ = toolchain()
        if tools is not None:
            self.build_number = "1cuda" if tools.nvcc else "0cpu"
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class PlatformDistribution(Distribution):
    """Depends on the platform only if csrc is built."""

    def has_ext_modules(self) -> bool:
        return toolchain()[0] is not None


def describe_build() -> str:
    """What csrc will be: for people who build a wheel."""
    tools, why_not = toolchain()
    if tools is None:
        return (
            f"warning: csrc is not built: {why_not}. Left out: the compiled operators and the CUDA kernels; the engine "
            "takes its plain PyTorch paths. A wheel of this build is named py3-none-any"
        )
    if tools.nvcc is None:
        return f"csrc: operators without CUDA kernels: {why_not}. A wheel of this build has 0cpu in its name"
    return f"csrc: operators and CUDA kernels for {tools.archs}"


@functools.cache
def toolchain() -> tuple[Toolchain | None, str]:
    """The compilers, None if csrc cannot be built, and why something is left out."""
    wanted = os.environ.get("TRIAXIS_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"TRIAXIS_CUDA={wanted}: expected auto, on or off")
    try:
        return _find_tools(wanted)
    except LookupError as error:
        if wanted == "on":
            raise SystemExit(f"TRIAXIS_CUDA=on, and csrc cannot be built: {error.args[0]}") from error
        return None, error.args[0]


def _find_tools(wanted: str) -> tuple[Toolchain, str]:
    cxx = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if cxx is None:
        raise LookupError("no C++ compiler (CXX, g++ or c++)")
    nvcc, why_not = (None, "TRIAXIS_CUDA=off") if wanted == "off" else (find_nvcc(), "")
    if nvcc is None and wanted != "off":
        why_not = "no nvcc (CUDA_HOME, /usr/local/cuda or PATH)"
        if wanted == "on":
            raise LookupError(why_not)
    return Toolchain(cxx, _torch(), nvcc, os.environ.get("TRIAXIS_CUDA_ARCHS", DEFAULT_ARCHS)), why_not


def _torch() -> Path:
    """The folder of torch: of this interpreter, or of the environment behind pip's isolated one."""
    spec = importlib.util.find_spec("torch")
    folders = [*(spec.submodule_search_locations or [] if spec else [])]
    folders += [os.path.join(sysconfig.get_paths()[name], "torch") for name in ("purelib", "platlib")]
    for folder in folders:
        if os.path.exists(os.path.join(folder, "include", "torch", "csrc", "stable", "library.h")):
            return Path(folder)
    raise LookupError("torch is not installed here; install it first, then this package with --no-build-isolation")


setup(
    distclass=PlatformDistribution,
    ext_modules=[Extension("engine._csrc", sources=[], optional=True)],
    cmdclass={
        "build_ext": BuildCsrc,
        "build_py": BuildPackage,
        "bdist_wheel": NamedWheel,
        "sdist": SourceWithCommit,
    },
)
