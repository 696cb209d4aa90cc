"""What is said and refused at the start about the connections between ranks."""

import pytest
import torch

from engine.config.schema import Config
from engine.errors import ConfigError
from engine.parallel.layout import CHANNELS, Layout, World, init_distributed
from engine.testing.distributed import run_ranks
from engine.testing.runs import run_config
from engine.train import start

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(dp=2), "2 groups of this rank connected in 1.2 s"),
        (Layout(pp=2), "1 group and 2 pairs of stages of this rank connected in 1.2 s"),
        (Layout(2, 2, 1, 2), "3 groups and 2 pairs of stages of this rank connected in 1.2 s"),
    ],
)
def test_the_line_on_links(layout, said):
    links = tuple(layout.links(0, wraps=False, tied=False))
    assert start.describe_links(World(layout, 0, 0, 1, CPU, links=links, connect_s=1.23)) == said


def connected(config: Config) -> tuple[list[str], bool, float]:
    """The channels of this rank, whether the ends share a group, and how long connecting took."""
    world, _ = start.arrange_ranks(config, init_distributed("cpu"))
    return list(world.channels), world.embedding_group is not None, world.connect_s


@pytest.mark.parametrize(
    ("overrides", "num_channels", "tied"),
    [
        ((), 2, False),
        (("--model.tie_embeddings", "true"), 2, True),
        (("--parallel.schedule", "interleaved", "--parallel.virtual_stages", "2"), 4, False),
    ],
)
def test_a_run_makes_the_groups_that_its_model_and_schedule_need(workspace, overrides, num_channels, tied):
    config = run_config(workspace, "--parallel.pp", "2", *overrides)
    for channels, has_embedding_group, seconds in run_ranks(2, connected, config):
        assert channels == list(CHANNELS[:num_channels]) and has_embedding_group == tied
        assert 0 < seconds < 60


def test_hardware_queues_are_checked_for_the_layout_of_the_run(workspace, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    start.arrange_ranks(run_config(workspace), init_distributed("cpu"))
    monkeypatch.setattr(start, "choose_layout", lambda config, ranks: (Layout(pp=2), "asked for"))
    monkeypatch.setattr(start, "require_fit", lambda *_: None)
    check = start.check_hardware_queues
    monkeypatch.setattr(start, "check_hardware_queues", lambda environment, pp, _: check(environment, pp, "cuda"))
    with pytest.raises(ConfigError, match=r"CUDA_DEVICE_MAX_CONNECTIONS = 1 with parallel\.pp = 2"):
        start.arrange_ranks(run_config(workspace), init_distributed("cpu"))
