import pytest

from engine.config.schema import Config, ModelConfig, ParallelConfig
from engine.model.parameters import parameter_table
from engine.parallel.layout import Layout, TensorParallel
from engine.plan.stages import head_cost, model_parts, stage_parts
from engine.testing.runs import run_config

INTERLEAVED = ("--parallel.schedule", "interleaved", "--parallel.virtual_stages", "2")


def sections(config: Config) -> tuple[ModelConfig, ParallelConfig, int]:
    return config.model, config.parallel, config.data.seq_length


def test_parts_are_dealt_out_in_rounds(tmp_path):
    sizes = ("--model.num_layers", "8", "--parallel.layers_per_stage", "[3, 2, 2, 1]")
    config = run_config(tmp_path, *sizes, *INTERLEAVED)
    assert [list(part.layers) for part in stage_parts(*sections(config), 2, 0)] == [[0, 1, 2], [5, 6]]
    assert [list(part.layers) for part in stage_parts(*sections(config), 2, 1)] == [[3, 4], [7]]
    assert [(part.has_embedding, part.has_head) for part in model_parts(*sections(config), 2)] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen2", "tiny-starcoder2"])
@pytest.mark.parametrize("changes", [(), INTERLEAVED])
def test_the_ranks_together_hold_the_model_once(tmp_path, preset, changes):
    config = run_config(tmp_path, *changes, preset=preset)
    layout = Layout(pp=2, tp=4, dp=2)
    tables = [
        parameter_table(
            config.model, stage_parts(*sections(config), layout.pp, at.pp), TensorParallel(at.tp, layout.tp)
        )
        for at in map(layout.coordinates, range(layout.world_size))
    ]
    owned = [
        (tensor.name, tensor.rectangle)
        for rank, table in enumerate(tables)
        for tensor in table.logical()
        if tensor.owned and layout.coordinates(rank).dp == 0
    ]
    assert len(set(owned)) == len(owned)
    assert sum(rectangle.size for _, rectangle in owned) == parameter_table(config.model).num_parameters


@pytest.mark.parametrize(
    ("preset", "cost"), [("llama2-7b", 0.6), ("llama3-8b", 2.24), ("qwen2.5-7b", 2.2), ("starcoder2-7b", 0.96)]
)
def test_the_head_of_the_7b_models_weighs_what_it_multiplies(tmp_path, preset, cost):
    config = run_config(tmp_path, preset=preset)
    assert head_cost(config.model, 4096) == pytest.approx(cost, abs=0.01)


@pytest.mark.parametrize(
    ("preset", "pp", "expected"),
    [
        ("llama2-7b", 4, [8, 8, 8, 8]),
        ("llama3-8b", 2, [17, 15]),
        ("llama3-8b", 4, [8, 9, 9, 6]),
        ("llama3-8b", 8, [4, 4, 4, 4, 4, 5, 5, 2]),
        ("qwen3-8b", 8, [4, 5, 5, 5, 5, 5, 5, 2]),
    ],
)
def test_layers_make_room_for_the_head(tmp_path, preset, pp, expected):
    config = run_config(tmp_path, "--data.seq_length", "4096", preset=preset)
    assert [len(part.layers) for part in model_parts(*sections(config), pp)] == expected
