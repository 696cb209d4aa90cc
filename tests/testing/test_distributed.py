"""A rank that hangs or dies says where, and what it last asked of the others."""

import ctypes
import time

import pytest
import torch
import torch.distributed as dist

from engine.testing.distributed import run_ranks
from engine.testing.hangs import last_calls


def wait_for_nobody() -> None:
    dist.all_reduce(torch.ones(3, 5))
    if dist.get_rank() == 0:
        sleep_without_end()
    dist.recv(torch.zeros(7), 0)


def sleep_without_end() -> None:
    time.sleep(1000)


def test_a_hang_shows_all_stacks_and_the_last_calls():
    with pytest.raises(RuntimeError) as caught:
        run_ranks(2, wait_for_nobody, timeout_s=3)
    first, second = str(caught.value).split("rank 1 failed:\n")
    assert "rank 0 failed:\nhas not finished within 3 s\nstacks of rank 0:" in first
    assert "in sleep_without_end" in first
    assert "in recv" not in first
    assert "in recv" in second
    assert "in wait_for_nobody" in second
    for text in (first, second):
        assert "gloo:all_reduce collective 1 of group 0/default_pg: [[3, 5]] -> [[3, 5]]" in text


def crash() -> None:
    ctypes.string_at(0)


def test_a_crash_shows_where():
    with pytest.raises(RuntimeError, match=r"(?s)without an error message, exit code -11\nstacks of rank 0:.*in crash"):
        run_ranks(1, crash)


def test_calls_of_the_flight_recorder_as_text():
    entry = b'{"collective_seq_id":%d,"p2p_seq_id":4,"is_p2p":%s,"process_group":["2","tp"],"profiling_name":"nccl:%s",'
    entry += b'"input_sizes":[[8]],"output_sizes":[[16]],"state":"started"}'
    entries = [entry % (number, b"false", b"_all_gather_base") for number in range(3)] + [entry % (9, b"true", b"send")]
    dump = b'{"entries":[%s],"version":"2.10"}' % b",".join(entries)
    assert last_calls(dump, 2) == [
        "nccl:_all_gather_base collective 2 of group 2/tp: [[8]] -> [[16]], started",
        "nccl:send p2p 4 of group 2/tp: [[8]] -> [[16]], started",
    ]
    assert last_calls(b"{}") == []
