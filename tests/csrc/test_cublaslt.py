"""FP8 matmuls by cuBLASLt: plans, their algorithms, and the choice by measuring.

csrc/gemm/cublaslt_fp8.cpp runs on a library that takes the place of libcublasLt (cublaslt.cpp) and notes its calls.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csrc.build import find_nvcc
from engine.ops import fp8_algorithms
from engine.ops.fp8_algorithms import NUM_CANDIDATES, Fp8Plans, Plan
from engine.parallel.layout import init_distributed
from engine.testing.distributed import run_ranks
from engine.testing.runs import run_config
from engine.train.log import RunLog
from engine.train.measure import choose_fp8_algorithms

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)
BF16, E4M3, E5M2, TENSORWISE, BLOCK_1X128, BLOCK_128X128 = 1, 3, 4, 0, 1, 2
CXX = os.environ.get("CXX", "g++")


class Arguments(ctypes.Structure):
    """triaxis_fp8_matmul_args."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "a_scale_inv", "b_scale_inv", "out", "workspace")),
        ("workspace_bytes", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in "mnk"),
        *((name, ctypes.c_int) for name in ("a_dtype", "b_dtype", "out_dtype", "a_scaling", "b_scaling")),
        *((name, ctypes.c_int) for name in ("accumulate", "fast")),
    ]


class Library:
    """csrc's matmul on the library that notes its calls. A matmul returns the number of the algorithm that it got."""

    def __init__(self, ours: Path, fake: ctypes.CDLL) -> None:
        self.ours, self.fake = ctypes.CDLL(str(ours)), fake
        self.plans = Fp8Plans(self.ours)
        ctypes.c_int.in_dll(fake, "fake_heuristics").value = 0

    def matmul(self, m: int, n: int, k: int, **other: int) -> int:
        formats = {"a_dtype": E4M3, "b_dtype": E4M3, "out_dtype": BF16, "workspace_bytes": 1 << 20}
        status = self.ours.triaxis_fp8_matmul(ctypes.byref(Arguments(m=m, n=n, k=k, **(formats | other))), 0, None)
        assert status == 0
        return ctypes.c_uint64.in_dll(self.fake, "fake_algorithm").value

    def noted(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.fake, name).value


def compile_cxx(*arguments: object) -> None:
    command = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", *map(str, arguments)]
    subprocess.run(command, check=True)


def number(algorithm: bytes) -> int:
    return int.from_bytes(algorithm[:8], "little")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both libraries; csrc finds the other by its name, as it finds the one that torch has loaded."""
    if "libcublasLt" in Path("/proc/self/maps").read_text():
        pytest.skip("torch has loaded NVIDIA's libcublasLt; tests/gpu/test_fp8_algorithms.py runs on it")
    directory = tmp_path_factory.mktemp("cublaslt")
    fake, ours = directory / "libcublasLt.so.13", directory / "matmul.so"
    compile_cxx(ROOT / "tests" / "csrc" / "cublaslt.cpp", "-shared", f"-Wl,-soname,{fake.name}", "-o", fake)
    sources = (ROOT / "csrc" / "gemm" / "cublaslt_fp8.cpp", ROOT / "csrc" / "bind" / "status.cpp")
    compile_cxx(*sources, "-shared", "-DTRIAXIS_EMULATED", "-ldl", "-o", ours)
    return ours, ctypes.CDLL(str(fake))


@pytest.fixture
def library(built, tmp_path):
    """Without plans: a copy of the library, which is loaded anew."""
    ours, fake = built
    return Library(Path(shutil.copy(ours, tmp_path)), fake)


def plan_of(m: int, n: int, k: int) -> Plan:
    return Plan(0, m, n, k, E4M3, E4M3, BF16, TENSORWISE, TENSORWISE, 0)


def test_the_first_matmul_of_a_shape_asks_for_one_algorithm(library):
    assert library.plans.existing() == []
    assert [library.matmul(32, 48, 64) for _ in range(3)] == [100, 100, 100]
    assert (library.noted("fake_heuristics"), library.noted("fake_requested")) == (1, 1)
    library.matmul(32, 48, 128)
    assert library.noted("fake_heuristics") == 2
    assert library.plans.version == 130400


def test_the_keys_of_plans(library):
    library.matmul(32, 48, 64, a_dtype=E5M2, fast=1)
    library.matmul(16, 48, 64, a_scaling=BLOCK_1X128, b_scaling=BLOCK_128X128, out_dtype=0, accumulate=1)
    assert library.plans.existing() == [
        Plan(0, 16, 48, 64, E4M3, E4M3, 0, BLOCK_1X128, BLOCK_128X128, 0),
        Plan(0, 32, 48, 64, E5M2, E4M3, BF16, TENSORWISE, TENSORWISE, 1),
    ]


def test_a_plan_gets_another_of_its_candidates(library):
    library.matmul(32, 48, 64), library.matmul(32, 48, 128)
    candidates = library.plans.candidates(plan_of(32, 48, 64))
    assert library.noted("fake_requested") == NUM_CANDIDATES
    assert [number(algorithm) for algorithm in candidates] == [100, 101, 103, 104, 105]  # 102 cannot run
    library.plans.use(plan_of(32, 48, 64), candidates[3])
    assert (library.matmul(32, 48, 64), library.matmul(32, 48, 128)) == (104, 100)


def test_what_cannot_run_is_refused(library):
    plan = plan_of(32, 48, 64)
    library.matmul(32, 48, 64)
    *_, too_large = library.plans.candidates(plan)
    for algorithm, message in (
        (bytes(64), "FP8 matmul 32 × 48 × 64: cuBLAS status 7"),
        (too_large, "cuBLASLt has no matmul of these sizes"),  # it needs more workspace than there is
        (bytes(63), "64 bytes, not 63"),
    ):
        with pytest.raises(ValueError, match=message):
            library.plans.use(plan, algorithm)
    with pytest.raises(ValueError, match="cuBLASLt has no matmul"):
        library.plans.use(plan._replace(m=16), too_large)
    assert library.matmul(32, 48, 64) == 100


@pytest.fixture
def timed(library, monkeypatch):
    """The library with the seconds of each algorithm, of which only 105 cannot run; call it with a configuration, for
    one start of a run in which the shapes of `matmuls` have run, and get what was said."""
    seconds = {100: 5.0, 101: 4.0, 103: 1.0, 104: 3.0}
    measured: list[Plan] = []

    def calls(plan: Plan):
        measured.append(plan)
        return [lambda: library.matmul(plan.m, plan.n, plan.k)]

    monkeypatch.setattr(fp8_algorithms, "_calls", calls)
    monkeypatch.setattr(fp8_algorithms, "_seconds", lambda calls: seconds[calls[0]()])
    monkeypatch.setattr(fp8_algorithms, "_driver_version", lambda: 13000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    library.measured, library.seconds = measured, seconds
    return library


def start(library: Library, config, capsys) -> str:
    """Run the choice at the start of a run; returns what was said."""
    world = replace(init_distributed("cpu"), device=GPU)
    for algorithms in library.plans.existing():  # a process starts with the heuristic's first
        library.plans.use(algorithms, library.plans.candidates(algorithms)[0])
    log = RunLog(config.run.dir, active=True)
    try:
        assert choose_fp8_algorithms(config, world, log, library.plans)
    finally:
        log.close()
    return capsys.readouterr().out


def fp8_config(directory: Path, *overrides: str):
    fp8 = ("--precision.mode", "fp8", "--ops.measure", "true", "--ops.measured_dir", str(directory / "machine"))
    return run_config(directory, *fp8, *overrides)


def test_the_fastest_algorithm_of_each_matmul_is_measured_once(timed, tmp_path, capsys):
    for k in (64, 128):
        timed.matmul(32, 48, k)
    said = start(timed, fp8_config(tmp_path), capsys)
    assert said == (
        "fp8         2 matmuls by cuBLASLt 130400, as measured: 2 with another algorithm than its heuristic's first "
        f"(kept in {tmp_path / 'machine'})\n"
    )
    assert timed.measured == [plan_of(32, 48, 64), plan_of(32, 48, 128)]
    assert (timed.matmul(32, 48, 64), timed.matmul(32, 48, 128)) == (103, 103)
    timed.seconds[104] = 0.1
    start(timed, fp8_config(tmp_path, "--run.dir", str(tmp_path / "second")), capsys)
    assert len(timed.measured) == 2 and timed.matmul(32, 48, 64) == 103  # read from the machine's directory
    start(timed, fp8_config(tmp_path, "--ops.measured_dir", str(tmp_path / "emptied")), capsys)
    assert len(timed.measured) == 2 and timed.matmul(32, 48, 64) == 103  # a resumed run keeps its own
    elsewhere = ("--run.dir", str(tmp_path / "third"), "--ops.measured_dir", str(tmp_path / "another machine"))
    start(timed, fp8_config(tmp_path, *elsewhere), capsys)
    assert len(timed.measured) == 4 and timed.matmul(32, 48, 64) == 104


def test_algorithms_of_another_cublaslt_are_measured_again(timed, tmp_path, capsys, monkeypatch):
    timed.matmul(32, 48, 64)
    start(timed, fp8_config(tmp_path), capsys)
    monkeypatch.setattr(Fp8Plans, "version", 130500)
    timed.seconds[101] = 0.1
    start(timed, fp8_config(tmp_path), capsys)
    assert timed.matmul(32, 48, 64) == 101


@pytest.mark.parametrize("text", ["00" * 64, "not hexadecimal", "00"])
def test_an_algorithm_that_cannot_run_is_measured_again(timed, tmp_path, capsys, text):
    timed.matmul(32, 48, 64)
    start(timed, fp8_config(tmp_path), capsys)
    files = [*tmp_path.glob("run/measured/*.json"), *tmp_path.glob("machine/*.json")]
    for path in files:
        path.write_text(path.read_text().replace(kept := timed.plans.candidates(plan_of(32, 48, 64))[2].hex(), text))
    said = start(timed, fp8_config(tmp_path), capsys)
    assert said.count("is replaced") == len(files) == 2
    assert len(timed.measured) == 2 and timed.matmul(32, 48, 64) == 103
    assert all(kept in path.read_text() for path in files)


@pytest.mark.parametrize("override", [("--ops.measure", "false"), ("--precision.mode", "bf16"), ()])
def test_nothing_is_measured_where_results_must_not_depend_on_it(timed, tmp_path, override):
    timed.matmul(32, 48, 64)
    torch.use_deterministic_algorithms(not override)
    try:
        world = replace(init_distributed("cpu"), device=GPU)
        assert not choose_fp8_algorithms(fp8_config(tmp_path, *override), world, None, timed.plans)
    finally:
        torch.use_deterministic_algorithms(False)
    assert timed.measured == [] and timed.matmul(32, 48, 64) == 100


class RankPlans:
    """Plans of one rank of three: rank 1 lacks the first shape, rank 2 has another kind of GPU."""

    version = 130400

    def __init__(self, rank: int) -> None:
        self.rank, self.measured, self.used = rank, [], {}

    def existing(self):
        return [plan_of(16, 16, k) for k in ((16, 32), (32, 48), (16,))[self.rank]]

    def measured_key(self, plan: Plan):
        return {"what": "fp8-matmul", "gpu": "b" if self.rank == 2 else "a", **plan._asdict()}

    def candidates(self, plan: Plan, most: int) -> list[bytes]:
        return [bytes(64)]

    def measure(self, plan: Plan) -> bytes:
        self.measured.append(plan.k)
        return bytes([plan.k, 200 + self.rank] * 32)  # negative as integers

    def use(self, plan: Plan, algorithm: bytes) -> None:
        self.used[plan.k] = tuple(algorithm[:2])
        assert algorithm == algorithm[:2] * 32


def choose_on_ranks(directory: Path):
    world = replace(init_distributed("cpu"), device=GPU)
    own = directory / str(world.rank)  # nothing is shared by files
    config = fp8_config(directory, "--run.dir", str(own / "run"), "--ops.measured_dir", str(own / "machine"))
    plans = RankPlans(world.rank)
    assert choose_fp8_algorithms(config, world, RunLog(config.run.dir, active=False), plans)
    return plans.measured, plans.used


def test_replicas_take_the_algorithm_of_the_first_rank_with_the_shape_and_gpu(workspace):
    first, second, other = run_ranks(3, choose_on_ranks, workspace)
    assert first == ([16, 32], {16: (16, 200), 32: (32, 200)})
    assert second == ([48], {32: (32, 200), 48: (48, 201)})
    assert other == ([16], {16: (16, 202)})


def headers() -> Path | None:
    """The folder of cublasLt.h: of CUDA, or of the package nvidia-cublas."""
    nvcc, package = find_nvcc(), importlib.util.find_spec("nvidia")
    roots = (package and package.submodule_search_locations) or []
    folders = [Path(os.environ["CUBLAS_INCLUDE"])] if "CUBLAS_INCLUDE" in os.environ else []
    folders += [nvcc.parent.parent / "include"] if nvcc else []
    folders += [folder for root in roots for folder in Path(root).glob("*/include")]
    return next((folder for folder in folders if (folder / "cublasLt.h").exists()), None)


def test_structs_numbers_and_signatures_are_nvidias(tmp_path):
    include, nvcc = headers(), find_nvcc()
    if include is None or nvcc is None:
        pytest.skip("needs CUDA's headers and cublasLt.h, of CUDA or of the package nvidia-cublas (CUBLAS_INCLUDE)")
    flags = (f"-isystem{include}", f"-isystem{nvcc.parent.parent / 'include'}")
    compile_cxx(ROOT / "tests" / "csrc" / "cublaslt_header.cpp", *flags, "-c", "-o", tmp_path / "checked.o")
