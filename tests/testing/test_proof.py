"""Which ranks stand for a layout, and that what they run is what all run."""

from collections import Counter

import pytest

from engine.parallel.layout import Layout
from engine.testing.communication import Compute, Launch, Record
from engine.testing.proof import distinct_ranks, failures, record_in_processes
from engine.testing.recorded import record_training
from engine.testing.runs import run_config

LAYOUT = Layout(tp=2, pp=2, dp=4)


def coordinates(config, layout):
    return [layout.coordinates(rank) for rank in distinct_ranks(config, layout)]


def test_every_stage_two_data_parallel_ranks_and_two_tensor_parallel_ones(tmp_path):
    config = run_config(tmp_path, "--precision.mode", "bf16", preset="llama2-7b")
    layout = Layout(tp=8, pp=4, dp=32)
    found = coordinates(config, layout)
    assert len(found) == 16
    assert {(at.pp, at.dp, at.tp) for at in found} == {(p, d, t) for p in range(4) for d in (0, 1) for t in (0, 1)}


@pytest.mark.parametrize(("vocab_size", "expected"), [(256, [0, 1]), (258, [0, 1, 2, 3]), (257, [0, 1, 3])])
def test_tensor_parallel_ranks_with_other_shapes(tmp_path, vocab_size, expected):
    """Of four, some hold a row of the embeddings more."""
    config = run_config(tmp_path, f"--model.vocab_size={vocab_size}")
    assert [at.tp for at in coordinates(config, Layout(tp=4))] == expected


def kinds(records: list[Record], layout: Layout) -> Counter[object]:
    """The programs of ranks without their peers, by stage."""

    def step(event):
        if isinstance(event, Launch):
            return event.kind, event.group.axis, event.detail, event.shape, event.dtype, event.message, event.caller
        return type(event)

    # How many operators run between two launches may differ: a shard may begin in another tensor.
    programs = [(r.rank, [step(event) for event in r.events if not isinstance(event, Compute)]) for r in records]
    return Counter((layout.coordinates(rank).pp, tuple(program)) for rank, program in programs)


def test_all_ranks_run_programs_that_are_among_the_distinct_ones(tmp_path):
    config = run_config(tmp_path, "--batch.global=8", "--model.vocab_size=257")
    some, every = (record_training(config, LAYOUT, steps=1, ranks=r) for r in (distinct_ranks(config, LAYOUT), None))
    assert len(every) == 2 * len(some) == 16
    assert kinds(some, LAYOUT).keys() == kinds(every, LAYOUT).keys()
    assert failures(every) == failures(some, symmetric=True) == []
    assert "have no record" in failures(some)[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_record_shares(tmp_path, processes):
    config = run_config(tmp_path, "--batch.global=8", "--precision.mode=bf16")
    shares = list(record_in_processes(config, Layout(dp=4), [0, 1, 2], steps=1, processes=processes))
    assert sorted([record.rank for record in share] for share in shares) == [[0, 1], [2]]
    assert failures([record for share in shares for record in share], symmetric=True) == []
