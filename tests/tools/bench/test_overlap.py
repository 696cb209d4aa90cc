"""Shares of hidden communication, of made traces with a known answer and beside sampled time."""

import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError, DataError
from tools.bench.overlap import activity_of, intersection, length, main, overlaps, read_activity, union, usage

NCCL = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GEMM = "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT"
NORM = "void triaxis::(anonymous namespace)::norm_forward<__nv_bfloat16>(triaxis_norm_forward_args)"


def event(name: str, start: float, end: float, axis: str | None = None, cat: str = "kernel") -> dict[str, Any]:
    """An event as Kineto writes it; kernels of NCCL have the description of their group, as far as it was recorded."""
    group = {} if axis is None else {"Process Group Name": "7", "Process Group Description": axis}
    stream = {NCCL: 20}.get(name, 7)
    return {
        **{"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": stream, "ts": start, "dur": end - start},
        "args": {"stream": stream, "device": 0, "correlation": 1, **group},
    }


ONE_RANK = [
    event(GEMM, 0, 1000),
    event(NCCL, 500, 1500, "tp"),  # half of it hidden
    event(NORM, 2000, 3000),
    event(NCCL, 2000, 2500, "dp"),  # all of it, but not behind a matmul
    event(NCCL, 2250, 2750, "dp"),
    event(NCCL, 3500, 4500, "forward"),  # not at all
    event("Memcpy DtoD (Device -> Device)", 3600, 3700, cat="gpu_memcpy"),
    event(NCCL, 4400, 5000, "tp"),
]


def write(path: Path, events: list[dict[str, Any]], rank: int | None = 0, groups: dict[str, str] | None = None) -> Path:
    groups = [{"pg_name": name, "pg_desc": described} for name, described in (groups or {}).items()]
    info = {} if rank is None else {"distributedInfo": {"backend": "nccl", "rank": rank, "pg_config": groups}}
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9, "pid": 1, "tid": 1}
    mark = {"ph": "M", "name": "process_name", "ts": 0, "pid": 0, "tid": 0, "args": {"name": "python"}}
    content = orjson.dumps({"schemaVersion": 1, **info, "traceEvents": [mark, launch, *events]})
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["rank3.json", "rank3.json.gz"])
def test_a_trace_with_a_known_answer(tmp_path, name):
    found = read_activity(write(tmp_path / name, ONE_RANK, rank=3))
    rows = {row.axis: (row.launches, row.total_ms, row.hidden_ms, row.behind_matmuls_ms) for row in overlaps(found)}
    assert rows == {
        "dp": (2, 0.75, 0.75, 0),
        "pp": (1, 1.0, 0, 0),
        "tp": (2, 1.6, 0.5, 0.5),
        "all": (5, 3.25, 1.25, 0.5),  # tp and pp have 100 µs in common
    }
    spent = usage(found)
    assert (spent.rank, spent.total_ms, spent.compute_ms, spent.exposed_ms, spent.idle_ms) == (3, 5, 2, 2, 1)


def test_the_table_of_several_ranks(tmp_path, capsys):
    paths = [write(tmp_path / f"rank{rank}.json.gz", ONE_RANK, rank=rank) for rank in range(2)]
    main([*map(str, paths), "--json", str(tmp_path / "overlap.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "| 0 | tp | 2 | 1.60 | 0.50 | 1.10 | 31% | 31% |"
    assert lines[9] == "| 1 | all | 5 | 3.25 | 1.25 | 2.00 | 38% | 15% |"
    assert lines[-1] == "rank 1: 5.0 ms, computing 40.0%, only communicating 40.0%, idle 20.0%"
    written = orjson.loads((tmp_path / "overlap.json").read_bytes())
    assert [row["axis"] for row in written["overlap"]] == ["dp", "pp", "tp", "all"] * 2
    assert written["usage"][1]["exposed_ms"] == 2


def test_groups_that_only_the_head_of_the_trace_describes(tmp_path):
    bare = [event(NCCL, 0, 5), event(NCCL, 9, 12), event(GEMM, 0, 4)]
    bare[0]["args"]["Process Group Name"] = "7"
    bare[1]["args"]["Process Group Name"] = "0"
    path = write(tmp_path / "a.json", bare, groups={"7": "kv", "0": "default_pg"})
    assert set(read_activity(path).communication) == {"kv", "world"}
    assert set(read_activity(write(tmp_path / "b.json", bare, rank=None), 5).communication) == {"group 7", "group 0"}
    assert read_activity(tmp_path / "b.json", 5).rank == 5


def test_a_trace_without_nccl_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.json: 1 GPU activities, none of them a kernel of NCCL; record ranks"):
        read_activity(write(tmp_path / "a.json", [event(GEMM, 0, 1)]))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\x1f\x8bno gzip"])
def test_a_file_that_is_no_trace(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: not a trace of torch\.profiler"):
        read_activity(tmp_path / "a.json")


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 15)).map(lambda span: (span[0], span[0] + span[1])))


def running(intervals: list[tuple[int, int]]) -> list[bool]:
    """Whether one of them runs in each unit of time."""
    return [any(start <= at < end for start, end in intervals) for at in range(80)]


@given(spans, spans)
def test_intervals_beside_sampled_time(first, second):
    assert length(union(first)) == sum(running(first))
    common = sum(map(all, zip(running(first), running(second), strict=True)))
    assert intersection(union(first), union(second)) == common
    assert all(a[1] < b[0] for a, b in zip(union(first), union(first)[1:], strict=False))


@given(spans.filter(bool), spans, spans, spans)
def test_shares_beside_sampled_time(tp, dp, gemms, norms):
    kinds = [(NCCL, tp, "tp"), (NCCL, dp, "dp"), (GEMM, gemms, None), (NORM, norms, None)]
    events = [event(name, *span, axis) for name, intervals, axis in kinds for span in intervals]
    activity = activity_of(events, {}, 0)
    computing = running(gemms + norms)
    expected = {"tp": tp, "all": tp + dp} | ({"dp": dp} if dp else {})
    for row in overlaps(activity):
        sampled = running(expected.pop(row.axis))
        assert row.total_ms * 1e3 == pytest.approx(sum(sampled))
        assert row.hidden_ms * 1e3 == pytest.approx(sum(a and b for a, b in zip(sampled, computing, strict=True)))
        behind = sum(a and b for a, b in zip(sampled, running(gemms), strict=True))
        assert row.behind_matmuls_ms * 1e3 == pytest.approx(behind)
    assert not expected


def test_the_same_as_holistic_trace_analysis(tmp_path):
    """Its one figure is the share of all axes together; it wants a file name and a rank of its own kind."""
    analysis = pytest.importorskip("hta.trace_analysis")
    paths = {rank: write(tmp_path / f"rank{rank}.json.gz", ONE_RANK, rank=rank) for rank in range(2)}
    result = analysis.TraceAnalysis({rank: str(path) for rank, path in paths.items()}).get_comm_comp_overlap(
        visualize=False
    )
    ours = [overlaps(read_activity(path))[-1] for path in paths.values()]
    theirs = result.set_index("rank")["comp_comm_overlap_pctg"]
    assert [theirs[row.rank] for row in ours] == [
        pytest.approx(100 * row.hidden_ms / row.total_ms, abs=0.01) for row in ours
    ]
