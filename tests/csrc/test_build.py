"""Building csrc: every kernel compiles, the tuned ones without spills, and failures are named."""

import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csrc.build import BuildError, build_library, compile_objects, kernel_jobs, run
from engine.ops import native

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "csrc"


def test_every_kernel_compiles_for_hopper_and_the_tuned_ones_keep_to_their_registers(toolchain):
    objects = compile_objects(kernel_jobs(toolchain), BUILD)
    assert len(objects) == len(list((ROOT / "csrc").glob("*/*.cu")))
    reports = {path.stem.split("-")[0]: path.with_suffix(".txt").read_text(encoding="utf-8") for path in objects}
    assert all("for 'sm_90a'" in report for report in reports.values())
    kernels = re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores", reports["norm"])
    tuned = {name: int(spilled) for name, spilled in kernels if re.search(r"norm_(forward|backward)I", name)}
    assert len(tuned) == 3 * 2 * (2 * 3 + 2)  # dtypes, norms; vectors of a thread, forward with FP8 output and without
    assert not [name for name, spilled in tuned.items() if spilled]
    matmul = reports["fp8_sm90"]
    assert matmul.count(" 0 bytes spill stores, 0 bytes spill loads") == 4  # output dtypes, scalings
    assert "wgmma" not in matmul  # ptxas warns of them only if it has to serialize them
    # 4 warpgroups share the registers of a multiprocessor, before setmaxnreg moves them
    assert set(re.findall(r"for 'sm_90a'\n.*\n.*\n.*Used (\d+) registers", matmul)) == {"128"}


def test_the_custom_matmul_gives_a_stage_back_behind_a_fence(toolchain):
    """In the PTX of each kernel: reads of scales, the fence of the async proxy, the warp's barrier, the arrival."""
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=compute_90a", "-ptx", "-o", "-"]
    ptx = run([str(toolchain.nvcc), *flags, str(ROOT / "csrc" / "gemm" / "fp8_sm90.cu")])
    kernels = ptx.split(".entry ")[1:]
    assert len(kernels) == 4
    pattern = r"ld\.shared|wgmma\.wait_group|fence\.proxy\.async\.shared::cta|bar\.warp\.sync|mbarrier\.arrive\.shared"
    for kernel in kernels:
        found = re.findall(pattern, kernel)
        after_the_matmuls = found[found.index("wgmma.wait_group") :]
        last_read = max(i for i, name in enumerate(after_the_matmuls) if name == "ld.shared")
        given_back = ["fence.proxy.async.shared::cta", "bar.warp.sync", "mbarrier.arrive.shared"]
        assert after_the_matmuls[last_read + 1 : last_read + 4] == given_back


def test_without_nvcc_the_operators_are_there_and_no_kernels(toolchain, tmp_path):
    library = tmp_path / "plain.so"
    build_library(replace(toolchain, nvcc=None), BUILD, library)
    script = (
        f"import torch; torch.ops.load_library({str(library)!r}); "
        "print([torch._C._dispatch_has_kernel_for_dispatch_key(f'triaxis::{name}', 'CUDA') "
        "for name in ('norm_forward', 'fp8_matmul')])"
    )
    assert run([sys.executable, "-c", script]).strip() == "[False, True]"  # cuBLASLt needs no compiler here


def test_a_compiler_that_fails_is_an_error_with_what_it_said(toolchain, tmp_path):
    source = tmp_path / "kernels" / "wrong.cu"
    source.parent.mkdir()
    source.write_text("int f( {", encoding="utf-8")
    with pytest.raises(BuildError, match=r"wrong\.cu"):
        compile_objects([(source, [toolchain.cxx, "-x", "c++"])], tmp_path / "objects")
    assert not list((tmp_path / "objects").glob("*.o"))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"TRIAXIS_CUDA": "maybe"}, "TRIAXIS_CUDA=maybe: expected auto, on or off"),
        ({"TRIAXIS_CUDA": "on", "CXX": "/nowhere/g++", "PATH": "/nowhere"}, "cannot be built: no C++ compiler"),
        ({"TRIAXIS_CUDA": "auto", "CXX": "/nowhere/g++", "PATH": "/nowhere"}, "csrc is not built: no C++ compiler"),
        ({"TRIAXIS_CUDA_ARCHS": "12345a"}, "TRIAXIS_CUDA=off builds it without CUDA"),
    ],
)
def test_settings_of_the_build(toolchain, tmp_path, settings, expected):
    """On a copy: the package must stay unchanged if nothing can be built."""
    for name in ("csrc", "engine"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_csrc.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", **settings},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout + done.stderr
    assert (done.returncode == 0) == (expected.startswith("csrc is not built"))
    assert not (tmp_path / "engine" / "_csrc.so").exists()


def test_the_plain_paths_need_nothing_compiled(tmp_path):
    """An install without a compiler: the same package, without the library."""
    shutil.copytree(ROOT / "engine", tmp_path / "engine", ignore=shutil.ignore_patterns("_csrc.so", "__pycache__"))
    script = "import engine.ops.native as n; print(n.WHY_NOT); from engine.cli.env import *; print(*environment())"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("csrc was not built\n")
    assert "csrc was not built; plain PyTorch paths" in done.stdout


def test_a_library_of_another_torch_is_named(tmp_path):
    shutil.copytree(ROOT / "engine", tmp_path / "engine", ignore=shutil.ignore_patterns("_csrc.so", "__pycache__"))
    (tmp_path / "engine" / "_csrc.so").write_bytes(b"no library")
    script = "import engine.ops.native as n; print(n.WHY_NOT)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "_csrc.so cannot be loaded" in done.stdout


def test_a_library_of_an_older_package_is_named(monkeypatch):
    monkeypatch.setattr(native, "SCHEMA_VERSION", native.SCHEMA_VERSION + 1)
    assert "belongs to another version of this package (operator schemas 2, expected 3); reinstall" in native._load()


def test_every_operator_is_in_the_library():
    for name in native._FAKES:
        assert getattr(torch.ops.triaxis, name).default


def test_what_is_installed_is_built():
    """This very environment: a compiler is here, so the operators are."""
    if shutil.which("g++"):
        assert not native.WHY_NOT
        assert torch.ops.triaxis.norm_forward
        assert sysconfig.get_platform().split("-")[0] in ("linux", "macosx")
