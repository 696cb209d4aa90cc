"""Connecting: a link that does not answer is named, and ends the process, whatever it is blocked in."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from engine.errors import ConfigError, PeerError
from engine.parallel import connect, layout
from engine.parallel.connect import Link, Place, Watch, check_hardware_queues, describe_ranks, meet
from engine.parallel.layout import Layout, build_process_groups, init_distributed
from engine.testing.distributed import run_ranks

HERE = socket.gethostname()
LIMIT_S = 1.0


def connect_and_fail(directory: Path, grid: Layout, fails: int, how: str, at: str) -> None:
    """Connect in `grid`; stderr goes to a file. Rank `fails` fails at the link `at`, or before all."""
    world = init_distributed("cpu")
    os.dup2(os.open(directory / f"rank{world.rank}", os.O_WRONLY | os.O_CREAT), 2)
    fail = {"sleeps": lambda: time.sleep(60), "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP)}
    fail["dies"] = lambda: os._exit(9)
    exchange: Callable[..., Any] = layout._exchange

    def fail_at(token: Any, link: Link, *rest: Any) -> Any:
        if world.rank == fails and link.axis == at:
            fail[how]()
        return exchange(token, link, *rest)

    layout._exchange = fail_at
    if world.rank == fails and not at:
        fail[how]()
    build_process_groups(replace(world, connect_timeout_s=LIMIT_S), grid)


def reports(directory: Path, *arguments: Any) -> tuple[str, list[str]]:
    """What run_ranks says when 4 ranks connect, and the errors that they have printed themselves."""
    with pytest.raises(RuntimeError) as failed:
        run_ranks(4, connect_and_fail, directory, *arguments, timeout_s=30)
    printed = "".join((directory / f"rank{rank}").read_text() for rank in range(4))
    return str(failed.value), [line for line in printed.splitlines() if line.startswith("error: ")]


def test_a_rank_that_never_connects_is_named(tmp_path):
    failed, errors = reports(tmp_path, Layout(tp=2, dp=2), 3, "sleeps", "")
    assert "died without an error message, exit code 69" in failed
    late = "error: the link {} has not answered for 1 s: "
    named = f"{late.format('dp of ranks 1, 3')}not begun to connect: rank 3 ({HERE}); waiting: rank 1 ({HERE})"
    behind = f"{late.format('tp of ranks 0, 1')}at another link: rank 1 ({HERE}, dp); waiting: rank 0 ({HERE})"
    also = f"{late.format('tp of ranks 2, 3')}not begun to connect: rank 3 ({HERE}); waiting: rank 2 ({HERE})"
    assert named in errors
    assert set(errors) <= {named, behind, also} and len(errors) == len(set(errors))


def test_a_rank_that_stops_while_it_connects_is_named(tmp_path):
    """The groups are made; the rank has begun the first operation of its last link. Each link is reported once."""
    failed, errors = reports(tmp_path, Layout(tp=4), 2, "stops", "tp")
    assert "died without an error message, exit code 69" in failed
    (error,) = errors
    assert error.startswith(
        f"error: the link tp of ranks 0, 1, 2, 3 has not answered for 1 s: waiting: ranks 0 ({HERE})"
    )
    assert error.endswith("parallel.connect_timeout_s gives it more time") and "all have begun" in error


def test_a_pair_of_stages_is_named(tmp_path):
    _, errors = reports(tmp_path, Layout(pp=2, dp=2), 3, "stops", "backward")
    assert f"error: the link backward of ranks 3, 1 has not answered for 1 s: waiting: ranks 3 ({HERE}), 1" in errors[0]


def test_a_rank_elsewhere_is_named_with_its_link(tmp_path):
    """Rank 0 waits for rank 2, which has not come out of its link with rank 3."""
    _, errors = reports(tmp_path, Layout(pp=2, tp=2), 3, "stops", "tp")
    assert any("of ranks 2, 3" in error and f"waiting: ranks 2 ({HERE}), 3 ({HERE})" in error for error in errors)
    elsewhere = [error for error in errors if error.startswith("error: the link forward of ranks 0, 2")]
    assert all(f"at another link: rank 2 ({HERE}, tp)" in error for error in elsewhere)


def test_an_error_of_the_backend_names_the_link(tmp_path):
    failed, _ = reports(tmp_path, Layout(dp=4), 1, "dies", "dp")
    assert "rank 1 failed:\ndied without an error message, exit code 9" in failed
    assert "engine.errors.PeerError: the link dp of ranks 0, 1, 2, 3 failed (" in failed


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


def test_a_process_that_waits_in_the_store_ends_too(store, monkeypatch):
    """NCCL fetches a communicator's id over the connection that the caller uses; the watch takes one of its own."""
    ended: list[PeerError] = []
    monkeypatch.setattr(connect, "end_process", ended.append)
    client = dist.TCPStore("127.0.0.1", store.port, None, wait_for_workers=False, timeout=timedelta(seconds=10))
    connect._note(client, 1, "")
    watch = Watch(client, 0, 0.1)
    threading.Timer(1.5, lambda: store.set("id", "")).start()
    with watch:
        watch.begin(Link("dp", (0, 1)))
        client.get("id")
        assert ended
    assert str(ended[0]).endswith(f"for 0.1 s: not begun to connect: rank 1 ({HERE}); waiting: rank 0 ({HERE})")
    assert not ended[0].reported_elsewhere and all(error.reported_elsewhere for error in ended[1:])


def test_a_link_is_late_until_the_device_is_done(store):
    watch = Watch(store, 0, 1.0)
    done = SimpleNamespace(is_completed=lambda: True)
    pending = SimpleNamespace(is_completed=lambda: False)
    first, second, third = (Link(axis, (0, 1)) for axis in ("dp", "tp", "kv"))
    now = time.monotonic() + 1
    assert watch._late(now) is None
    watch.begin(first)
    assert watch._late(now) == first and watch._late(now - 2) is None
    watch.launched(done)
    assert watch._late(now) is None
    watch.begin(second)
    watch.launched(pending)
    watch.begin(third)
    assert watch._late(now) == second
    pending.is_completed = lambda: True
    assert watch._late(now) == third


def test_memory_that_runs_out_is_not_blamed_on_the_link(store):
    with pytest.raises(RuntimeError, match="OutOfMemoryError: 2 GiB"), Watch(store, 0) as watch:
        watch.begin(Link("dp", (0, 1)))
        raise RuntimeError("OutOfMemoryError: 2 GiB")


@pytest.fixture
def torchrun(store, monkeypatch):
    """The environment of a rank whose store torchrun serves."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))


def test_ranks_meet_whoever_comes_last(torchrun, capfd):
    met: list[Any] = []
    first = threading.Thread(target=lambda: met.append(meet(0, 2, timeout_s=20, limit_s=0.2)))
    first.start()
    time.sleep(1)
    meet(1, 2, timeout_s=20)
    first.join()
    assert met
    assert "waiting for rank 1" in capfd.readouterr().err.splitlines()


def test_ranks_that_torchrun_starts_again_meet_again(torchrun, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = meet(0, 1, timeout_s=20)
    first.set("address", "of a rank that has ended")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(PeerError, match=r"have not started: rank 1$"):
        meet(0, 2, timeout_s=1)
    assert not meet(1, 2, timeout_s=20).check(["address"])
    assert connect.clone(first).check(["address"])


def test_nodes_that_count_other_restarts_meet(torchrun, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(PeerError, match=r"have not started: rank 1$"):
        meet(0, 2, timeout_s=1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert meet(1, 2, timeout_s=20)


def test_a_store_that_does_not_answer_is_named(torchrun, monkeypatch, store):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(PeerError, match=f"MASTER_PORT = {port}.*timed out.*{port}") as failed:
        meet(1, 2, timeout_s=1)
    assert "\n" not in str(failed.value)


def test_ranks_that_do_not_start_are_named(torchrun, capfd):
    with pytest.raises(PeerError, match="after 1 s these have not started: ranks 1, 2"):
        meet(0, 3, timeout_s=1, limit_s=0.4)
    assert "waiting for ranks 1, 2" in capfd.readouterr().err.splitlines()


def test_what_is_said_of_each_rank():
    link = Link("dp", (0, 2, 4, 6))
    places = {0: Place("a", "dp"), 2: Place("a", "tp"), 4: Place("b", "")}
    assert describe_ranks(link, places) == (
        "not started: rank 6; not begun to connect: rank 4 (b); at another link: rank 2 (a, tp); waiting: rank 0 (a)"
    )
    assert "does not answer either" in describe_ranks(link, {})
    many = Link("world", tuple(range(1024)))
    said = describe_ranks(many, {rank: Place("a", "world") for rank in range(1, 1024)})
    assert said.startswith("not started: rank 0; waiting: ranks 1 (a), 2 (a), ")
    assert said.endswith(" 8 (a) and 1,015 more")


@pytest.mark.parametrize(
    ("queues", "pp", "device"), [("1", 1, "cuda"), ("1", 4, "cpu"), ("32", 4, "cuda"), ("", 4, "cuda")]
)
def test_hardware_queues_that_are_enough(queues, pp, device):
    check_hardware_queues({"CUDA_DEVICE_MAX_CONNECTIONS": queues} if queues else {}, pp, device)


def test_one_hardware_queue_is_refused():
    with pytest.raises(ConfigError, match=r"CUDA_DEVICE_MAX_CONNECTIONS = 1 with parallel\.pp = 2: .*set it to 32"):
        check_hardware_queues({"CUDA_DEVICE_MAX_CONNECTIONS": " 1"}, 2, "cuda")
