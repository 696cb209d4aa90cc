"""Building csrc: every kernel compiles, the tuned ones keep to their registers, and failures are named."""

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
from csrc.report import Kernel, divisions, find_cuobjdump, read_kernels
from engine.ops import native

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "csrc"


@pytest.fixture(scope="module")
def objects(toolchain):
    """Objects of the kernel files by name, compiled."""
    return {path.stem.rpartition("-")[0]: path for path in compile_objects(kernel_jobs(toolchain), BUILD)}


def kernels_of(target: Path, part: str) -> dict[str, Kernel]:
    """Kernels in an object whose mangled names contain `part`, with their code. Skips without cuobjdump."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump and nvdisasm: of the CUDA toolkit, or pip install 'triaxis[dev]' on Linux x86-64")
    return {name: kernel for name, kernel in read_kernels(target, cuobjdump).items() if part in name}


def test_every_kernel_compiles_for_hopper_and_the_tuned_ones_keep_to_their_registers(objects):
    assert len(objects) == len(list((ROOT / "csrc").glob("*/*.cu")))
    reports = {name: read_kernels(path, None) for name, path in objects.items()}
    assert all(reports.values())
    tuned = {n: k for n, k in reports["norm"].items() if "norm_forwardI" in n or "norm_backwardI" in n}
    # dtypes, norms; forward: vectors of a thread, kinds of output; backward: vectors, a gradient to add or not
    assert len(tuned) == 3 * 2 * (3 * 3 + 2 * 2)
    assert not [name for name, kernel in tuned.items() if kernel.spilled]
    one_vector = [k for name, k in tuned.items() if "norm_backwardI" in name and "Li1E" in name]
    assert len(one_vector) == 3 * 2 * 2
    assert all(kernel.registers <= 64 for kernel in one_vector)  # two blocks of 512 threads on a multiprocessor
    at_4096 = [k for name, k in tuned.items() if "norm_forwardI13__nv_bfloat16Lb0ELi2E" in name]
    assert len(at_4096) == 3
    assert all(kernel.registers <= 56 for kernel in at_4096)  # four blocks of 256 threads on a multiprocessor
    maxima = reports["amax"].values()
    assert len(maxima) == 3  # dtypes
    assert all(kernel.registers <= 32 and not kernel.spilled for kernel in maxima)
    quantizers = reports["quantize"]
    transposes = [name for name in quantizers if "transpose_fp8" in name]
    assert len(transposes) == 1 + 2  # one scale; formats in blocks
    assert all(quantizers[name].registers <= 80 for name in transposes)
    # dtypes; formats; one scale, or blocks whose scales are powers of two or not
    assert len(quantizers) - len(transposes) == 3 * 2 * (1 + 2 * 2)
    assert not [name for name, kernel in quantizers.items() if kernel.spilled]
    bf16 = [kernel for name, kernel in quantizers.items() if "bfloat16" in name]
    assert all(kernel.registers <= 80 for kernel in bf16)  # three blocks of 256 threads on a multiprocessor, or four
    matmul = reports["fp8_sm90"]
    assert len(matmul) == 4  # output dtypes, scalings
    assert not [name for name, kernel in matmul.items() if kernel.spilled]
    # 4 warpgroups share the registers of a multiprocessor, before setmaxnreg moves them
    assert {kernel.registers for kernel in matmul.values()} == {128}
    report = objects["fp8_sm90"].with_suffix(".txt").read_text(encoding="utf-8")
    assert "wgmma" not in report  # ptxas warns of them only if it has to serialize them


@pytest.mark.parametrize("centered, limits", [(0, (400, 440, 485)), (1, (550, 605, 650))], ids=["RMSNorm", "LayerNorm"])
def test_a_row_of_the_forward_of_a_norm_takes_few_instructions(objects, centered, limits):
    """At 4096 columns in bf16, where a thread has two vectors, with a residual; plain, with one scale, and with one for
    each block: 368, 411 and 453 when this was written (515, 567 and 607 with a mean), and no division.
    """
    found = kernels_of(objects["norm"], f"norm_forwardI13__nv_bfloat16Lb{centered}ELi2E")
    for output, limit in enumerate(limits):
        (loop,) = (kernel.loop for name, kernel in found.items() if f"OutputE{output}E" in name)
        assert 128 < len(loop) <= limit  # 16 elements, of which each takes 8 instructions at least
        assert divisions(loop) == 0


@pytest.mark.parametrize("centered, limit", [(0, 220), (1, 370)], ids=["RMSNorm", "LayerNorm"])
def test_a_row_of_the_backward_of_a_norm_takes_few_instructions(objects, centered, limit):
    """At 4096 columns in bf16, where a thread has one vector: 190 and 340 when this was written, and no division."""
    found = kernels_of(objects["norm"], f"norm_backwardI13__nv_bfloat16Lb{centered}E")
    loops = [kernel.loop for name, kernel in found.items() if "Li1E" in name]
    assert len(loops) == 2  # with a gradient to add, and without
    for loop in loops:
        assert 128 < len(loop) <= limit  # 8 elements, of which each takes 16 instructions at least
        assert divisions(loop) == 0
        assert sum("STG.E.128" in i.text for i in loop) == 1  # it is the loop over rows


def test_reading_a_tensor_for_its_amax_takes_few_instructions(objects):
    """In bf16 115 for 32 elements when this was written, of which four loads of 16 bytes."""
    (kernel,) = kernels_of(objects["amax"], "amaxI13__nv_bfloat16").values()
    assert sum("LDG.E.128" in i.text for i in kernel.loop) == 4
    assert 64 < len(kernel.loop) <= 130
    assert divisions(kernel.code) == 0


def test_quantizing_by_powers_of_two_divides_nothing(objects):
    """In bf16: 1,272 and 1,024 instructions with 1 × 128 and 128 × 128 blocks when this was written. With one scale,
    1,192: it divides for a scale from the amax, once a thread and not for each of its 64 elements, and for the scale's
    reciprocal.
    """
    found = kernels_of(objects["quantize"], "quantizeI13__nv_bfloat16")
    (one_scale,) = {len(kernel.code) for name, kernel in found.items() if "scaling0ELb0" in name}
    assert 500 < one_scale <= 1300
    assert all(divisions(kernel.code) <= 8 for name, kernel in found.items() if "scaling0ELb0" in name)
    scaled = {"scaling1ELb1": 1400, "scaling2ELb1": 1100}
    for which, limit in scaled.items():
        kernels = [kernel for name, kernel in found.items() if which in name]
        assert len(kernels) == 2  # formats
        for kernel in kernels:
            assert 500 < len(kernel.code) <= limit  # 64 elements, each of which takes 8 instructions at least
            assert divisions(kernel.code) == 0
    assert any(divisions(kernel.code) for name, kernel in found.items() if "scaling1ELb0" in name)  # what to look for


def test_a_backward_to_fp8_leaves_room_for_two_blocks(objects):
    """When this was written, SwiGLU's took 1,728 instructions with one scale and 2,136 in blocks, with 32 sigmoids;
    RoPE's took 870 and 1,047 for a tile.
    """
    limits = {"swiglu": (1850, 2300), "rope": (940, 1130)}
    for name, (one_scale, blocks) in limits.items():
        part = "swiglu_backward_fp8I" if name == "swiglu" else "_fp8I"
        reports = {n: k for n, k in read_kernels(objects[name], None).items() if part in n}
        assert len(reports) == 3 * 2  # dtypes, scalings
        assert not [n for n, kernel in reports.items() if kernel.spilled]
        found = kernels_of(objects[name], f"{part}13__nv_bfloat16")
        assert len(found) == 2
        for which, kernel in found.items():
            assert kernel.registers <= 64  # two blocks of 512 threads on a multiprocessor
            code = kernel.code if name == "swiglu" else kernel.loop
            assert 500 < len(code) <= (one_scale if "scaling0E" in which else blocks)
            assert divisions(code) == (32 if name == "swiglu" else 0)  # sigmoids of a thread


def test_swiglu_to_fp8_and_its_transpose_leaves_room_for_two_blocks(objects):
    """976 instructions for 32 elements of a thread when this was written, with 32 sigmoids."""
    reports = {n: k for n, k in read_kernels(objects["swiglu"], None).items() if "swiglu_forward_fp8I" in n}
    assert len(reports) == 3  # dtypes
    assert not [n for n, kernel in reports.items() if kernel.spilled]
    (kernel,) = kernels_of(objects["swiglu"], "swiglu_forward_fp8I13__nv_bfloat16").values()
    assert kernel.registers <= 64  # two blocks of 512 threads on a multiprocessor
    assert 500 < len(kernel.code) <= 1050
    assert divisions(kernel.code) == 32


def test_swiglu_and_rope_divide_nothing_but_for_the_sigmoid(objects):
    """In bf16, for 8 elements: SwiGLU forward 178 instructions a row and backward 262 (245 and 317 with exact
    divisions), to FP8 187 and 207 (371 before); RoPE 548 for a head of each of q, k and v.
    """
    loops = {n: k.loop for n, k in kernels_of(objects["swiglu"], "ardI13__nv_bfloat16Li8E").items()}
    assert len(loops) == 3 + 1  # outputs of the forward; the backward
    for name, loop in loops.items():
        assert 100 < len(loop) <= (285 if "backward" in name else 225)
        assert divisions(loop) == 8
    (rope,) = kernels_of(objects["rope"], "ropeI13__nv_bfloat16Li8E").values()
    assert 300 < len(rope.loop) <= 590
    assert divisions(rope.loop) == 0
    assert sum("LDG.E.128" in i.text for i in rope.loop) == 4 + 2 * 3  # angles in fp32; halves of a head


def test_transposing_divides_nothing(objects):
    """480 instructions for 64 bytes of a thread with one scale, and 936 in blocks, when this was written."""
    found = kernels_of(objects["quantize"], "transpose_fp8")
    assert len(found) == 3
    for name, kernel in found.items():
        assert 100 < len(kernel.code) <= (530 if "scaling0E" in name else 1030)
        assert divisions(kernel.code) == 0


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
    built = native.SCHEMA_VERSION
    monkeypatch.setattr(native, "SCHEMA_VERSION", built + 1)
    wanted = f"belongs to another version of this package (operator schemas {built}, expected {built + 1}); reinstall"
    assert wanted in native._load()


def test_every_operator_is_in_the_library():
    for name in native._FAKES:
        assert getattr(torch.ops.triaxis, name).default


def test_what_is_installed_is_built():
    """This very environment: a compiler is here, so the operators are."""
    if shutil.which("g++"):
        assert not native.WHY_NOT
        assert torch.ops.triaxis.norm_forward
        assert sysconfig.get_platform().split("-")[0] in ("linux", "macosx")
