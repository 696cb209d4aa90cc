"""The benchmark of the kernels: its arithmetic, its table, and its cases as they run on the host."""

import json
import multiprocessing
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError, StorageError
from tests.csrc.conftest import emulated, emulated_library, toolchain  # noqa: F401
from tools.bench import kernel_cases, kernel_table, kernels
from tools.bench.kernel_table import BEGIN, END, cells, key, rows, section, table, write_between_markers

COUNT = len(rows())
COPY_BYTES_PER_S = 4.3e12  # of one H200
DONE = {"seconds": 35e-6, "range": [34e-6, 36e-6], "share": 1.0, "copy": 32e-6, "others": {"a": 70e-6, "b": "failed"}}


def row(name: str):
    return next(row for row in rows() if row.name == name)


def test_bounds_are_the_bytes_at_the_speed_of_a_copy():
    moved = [row for row in rows() if row.unit in ("µs", "ms")]
    assert len(moved) == 22
    for row in moved:
        seconds = row.work / COPY_BYTES_PER_S
        assert row.bound / {"µs": 1e6, "ms": 1e3}[row.unit] == pytest.approx(seconds, rel=0.07), row.name


def test_targets_lie_between_floor_and_bound():
    for row in rows():
        assert row.floor < row.target < row.bound or row.floor > row.target > row.bound, row.name
    assert len({key(row) for row in rows()}) == COUNT


def test_products_have_the_flops_of_their_shape():
    matmuls = [row for row in rows() if row.unit == "TFLOP/s"]
    assert len(matmuls) == 10
    for row in matmuls:
        m, n, k = map(int, row.shape.split("×"))
        assert row.work == 2 * m * n * k


def test_cells():
    assert cells(row("RMSNorm forward"), DONE)[2:] == [
        "39", "34.7", "31.2 µs", "**35**", "3,835 GB/s", "32", "a, 2.00×"
    ]  # fmt: skip
    halved = cells(row("AdamW"), DONE | {"share": 0.5, "seconds": 0.052, "copy": 0.05})
    assert halved[1] == "6.74e9 (measured on 50%)"
    assert halved[4:8] == ["47 ms", "**52**", "3,888 GB/s", "50"]
    matmul = cells(row("FP8 GEMM tensorwise"), {"seconds": 660e-6, "share": 1.0, "others": {"a": "no"}})
    assert matmul[4:] == ["1,400 TFLOP/s", "**1,249**", "660 µs", "", "none ran"]
    assert cells(row("RMSNorm forward"), {"error": "wrong"})[5] == "failed: wrong"
    assert {len(cells(row, None)) for row in rows()} == {len(kernel_table.HEADER)}


def test_tables():
    results = {"RMSNorm forward": DONE}
    lines = table(results, markdown=True).splitlines()
    assert len(lines) == COUNT + 2
    assert (
        lines[2] == "| RMSNorm forward | 8192×4096 bf16 | 39 | 34.7 | 31.2 µs | **35** | 3,835 GB/s | 32 | a, 2.00× |"
    )
    assert lines[3].endswith("| not yet run on a GPU | | | |")
    plain = table(results, markdown=False).splitlines()
    assert len(plain) == COUNT + 1
    assert plain[0].index("shape") == plain[1].index("8192×4096")


def document(tmp_path, name: str, content: dict):
    path = tmp_path / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_results_go_between_the_markers(tmp_path, capsys):
    machine = {"gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"}
    measured = {"machine": {**machine, "copy_tb_s": 4.31, "bf16_tflops": 788.4}, "rows": {"RMSNorm forward": DONE}}
    files = [document(tmp_path, "a.json", measured), document(tmp_path, "b.json", {"machine": machine, "rows": {}})]
    target = tmp_path / "doc.md"
    target.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    for _ in range(2):  # the second time changes nothing
        assert kernels.main(["--results", *map(str, files), "--into", str(target)]) == 0
        written = target.read_text(encoding="utf-8")
    assert written.startswith(
        f"above\n{BEGIN}\n`bash tools/bench/gpu.sh` (NVIDIA H200, torch 2.11.0, abc). Here a device"
    )
    assert written.endswith(f"|\n{END}\nbelow\n")
    assert "moves 4.31 TB/s, a bf16 matmul of 8192³ runs at 788 TFLOP/s" in written
    assert "old" not in written
    assert "RMSNorm forward" in capsys.readouterr().out


def test_what_is_in_the_docs_is_what_the_tool_writes():
    text = (Path(__file__).parents[3] / "docs" / "measurements.md").read_text(encoding="utf-8")
    between = text.partition(BEGIN)[2].partition(END)[0]
    for row in rows():
        assert f"| {row.name} | {row.shape}" in between
    if "Not yet run" in between:
        assert between == f"\n{section([])}\n"


@pytest.mark.parametrize("content", ["no markers", f"{END}\n{BEGIN}\n", f"{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_a_document_without_its_markers(tmp_path, content):
    target = tmp_path / "doc.md"
    target.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a document with one line"):
        write_between_markers(target, "text")
    assert target.read_text(encoding="utf-8") == content


def test_arguments(tmp_path):
    with pytest.raises(ConfigError, match=r"--only nonsense: no row .* expected one of RMSNorm forward, residual add"):
        kernels.main(["--only", "nonsense"])
    assert {row.name for row in kernels.choose(["rmsnorm", "22016"])} >= {"RMSNorm forward", "FP8 GEMM tensorwise"}
    assert len(kernels.choose(None)) == COUNT
    with pytest.raises(ConfigError, match="--results measures nothing"):
        kernels.main(["--results", "--only", "RMSNorm"])
    with pytest.raises(StorageError, match=r"none\.json"):
        kernels.main(["--results", str(tmp_path / "none.json")])
    with pytest.raises(ConfigError, match="expected a file that --json wrote"):
        kernels.main(["--results", str(document(tmp_path, "a.json", {"rows": {}}))])


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds none"):
        kernels.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.native, "has_kernels", lambda: False)
    with pytest.raises(ConfigError, match="no kernels to measure"):
        kernels.main([])


def test_a_failing_row_or_alternative_leaves_the_others(monkeypatch, capsys):
    def case(row):
        if row.name == "RMSNorm forward":
            raise RuntimeError("no such kernel\nat all")
        calls = [lambda: None]
        return kernel_cases.Case(calls, lambda: None, {"good": lambda: calls, "bad": lambda: 1 / 0}, share=0.5)

    monkeypatch.setattr(kernels, "case_of", case)
    monkeypatch.setattr(kernels, "samples", lambda calls, refresh=None: [3.0, 1.0, 2.0])
    monkeypatch.setattr(kernels, "copy_seconds", lambda size: size / COPY_BYTES_PER_S)
    assert kernels.measure(row("RMSNorm forward")) == {"error": "RuntimeError: no such kernel"}
    result = kernels.measure(row("LayerNorm forward"))
    assert result["seconds"] == 4.0
    assert result["range"] == [2.0, 6.0]
    assert result["others"] == {"good": 4.0, "bad": "ZeroDivisionError: division by zero"}


def test_a_copy_has_fewer_elements_than_2_to_31(monkeypatch):
    """From there on PyTorch's copy is slower; the row with the most bytes is measured by a copy of `LARGEST_COPY`."""
    shapes = []

    def randint(high, shape, dtype, device):
        shapes.append((shape[0], dtype.itemsize))
        return torch.empty(0)

    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(kernels, "samples", lambda calls: [0.5])
    assert kernels.copy_seconds(2 * kernels.LARGEST_COPY) == pytest.approx(1.0)
    assert shapes == [(kernels.LARGEST_COPY // 16, 8)] * 2
    assert all(count < 2**31 for count, _ in shapes)


@pytest.fixture
def small(emulated, monkeypatch):  # noqa: F811
    """The cases at sizes for the host."""
    sizes = {"TOKENS": 32, "HIDDEN": 256, "FFN": 128, "VOCABULARY": 48, "HEADS": 2, "PARAMETERS": 20_000, "PIECE": 7000}
    for name, size in sizes.items():
        monkeypatch.setattr(kernel_cases, name, size)
    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))


def on_the_host():
    names = {row.name: row for row in rows()}
    chosen = [row for row in names.values() if "GEMM" not in row.name or "custom kernel" in row.name]
    assert sum("custom kernel" in row.name for row in chosen) == 2
    return chosen


@pytest.mark.parametrize("row", on_the_host(), ids=lambda row: row.name)
def test_cases_are_right_and_their_alternatives_too(small, row):
    torch.manual_seed(0)
    if "GEMM" in row.name:
        row = kernel_table.Row(row.name, "32×384×256", row.unit, row.floor, row.target, row.bound, row.work)
    case = kernel_cases.case_of(row)
    case.check()
    assert len(case.calls) == (1 if row.unit == "ms" else kernel_cases.SETS)
    for name, make in case.others.items():
        if name == "cuBLASLt":  # on a GPU alone
            continue
        if case.refresh is not None:
            case.refresh()
        calls = make()
        assert len(calls) == len(case.calls)
        if row.unit == "µs" and name != "torch, bf16":
            expected = kernel_cases._tensors(calls[0]())
            kernel_cases.require_close(case.calls[0](), expected, 2e-2)


def test_a_wrong_result_is_found():
    good = torch.randn(64)
    kernel_cases.require_close((good, torch.empty(0), good), (good, good), 1e-6)
    for bad in (good * 1.01, good * torch.nan, good[:, None]):
        with pytest.raises(ValueError, match="result 1 is off"):
            kernel_cases.require_close((good, bad), (good, good), 1e-3)


class Replayed:
    """Stands for a CUDA graph: runs nothing, for this is about what is done around it."""

    def replay(self):
        pass


class Mark:
    """Stands for a CUDA event: a millisecond between any two."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, other) -> float:
        return 1.0


@pytest.fixture
def on_gpu(small, monkeypatch):
    """The host stands for a GPU on which a replay takes a millisecond."""
    nothing = dict.fromkeys(("synchronize", "empty_cache", "current_stream", "Stream"), lambda: None)
    fakes = {"is_available": lambda: True, "get_device_name": lambda: "a GPU", "stream": nullcontext}
    graphs = {"CUDAGraph": Replayed, "Event": Mark, "graph": lambda graph, stream: nullcontext()}
    for name, fake in (nothing | fakes | graphs).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(kernels.native, "has_kernels", lambda: True)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(kernels, "CONTEXT", multiprocessing.get_context("fork"))  # with the same fakes
    monkeypatch.setattr(kernels, "MATMUL", 64)
    monkeypatch.setattr(kernels, "LARGEST_COPY", 4096)


def test_a_row_that_ruins_its_process_costs_no_other_row(on_gpu, monkeypatch, tmp_path, capfd):
    """By an illegal instruction, which all later calls report, or by a signal; the machine is measured once."""
    calls = [lambda: None]

    def synchronize():
        if broken:
            raise RuntimeError("CUDA error: an illegal instruction was encountered\nmore")

    def illegal():
        broken.append(True)
        synchronize()

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def case(row):
        print(f"process {os.getpid()}", flush=True)
        case = kernel_cases.Case(calls, {"RMSNorm forward": illegal, "SwiGLU forward": killed}.get(row.name, int))
        if row.name == "LayerNorm forward":
            case.others["another package"] = illegal
        return case

    broken = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(kernels, "case_of", case)
    machine = kernels.machine
    monkeypatch.setattr(kernels, "machine", lambda commit: print("machine", flush=True) or machine(commit))
    results = tmp_path / "a.json"
    names = ["RMSNorm", "LayerNorm", "SwiGLU", "RoPE"]
    assert kernels.main(["--only", *names, "--json", str(results), "--commit", "abc"]) == 1
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    illegal_instruction = "RuntimeError: CUDA error: an illegal instruction was encountered"
    assert {name: result["error"] for name, result in rows.items() if "error" in result} == {
        "RMSNorm forward": illegal_instruction,
        "SwiGLU forward": "its process ended with signal 9",
    }
    assert rows["LayerNorm forward"]["others"] == {"another package": illegal_instruction}
    assert len(rows) == len(kernels.choose(names))
    printed = capfd.readouterr().out
    assert printed.count("machine\n") == 1
    assert len(set(re.findall(r"process (\d+)", printed))) == 4


def test_a_machine_that_cannot_be_measured(on_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "machine", lambda commit: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="ceilings of this GPU cannot be measured: its process ended with signal 9"):
        kernels.main(["--only", "RoPE"])


def test_a_whole_run(on_gpu, tmp_path, capsys):
    """Every row but those whose kernel the host lacks, which fail and leave the others alone."""
    results, target = tmp_path / "runs" / "a.json", tmp_path / "doc.md"
    target.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    names = ["norm", "swiglu", "rope", "quantize", "amax", "cross", "adamw"]
    arguments = ["--only", *names, "--json", str(results), "--commit", "abc", "--into", str(target)]
    assert kernels.main(arguments) == 0
    document = json.loads(results.read_text(encoding="utf-8"))
    assert document["machine"]["gpu"] == "a GPU"
    assert document["machine"]["commit"] == "abc"
    assert document["machine"]["bf16_tflops"] == pytest.approx(2 * 64**3 / 1e-3 / 1e12)
    assert len(document["rows"]) == 20
    one = document["rows"]["SwiGLU forward"]
    assert one["seconds"] == pytest.approx(1e-3 / kernels.ROTATIONS / kernel_cases.SETS)
    assert document["rows"]["cross-entropy forward + backward"]["seconds"] == pytest.approx(1e-3 / kernel_cases.SETS)
    assert document["rows"]["AdamW"]["seconds"] == pytest.approx(1e-3)
    assert one["copy"] == pytest.approx(
        1e-3 / kernels.ROTATIONS / kernel_cases.SETS * row("SwiGLU forward").work / 4096
    )
    assert all(isinstance(time, float) for result in document["rows"].values() for time in result["others"].values())
    assert "failed" not in target.read_text(encoding="utf-8")
    assert kernels.main(["--only", "tensorwise 8192×12288", "--json", str(results)]) == 1
    assert "failed: " in capsys.readouterr().out
