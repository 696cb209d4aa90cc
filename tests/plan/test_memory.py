import pytest
import torch

from engine.config import OptimizerConfig
from engine.errors import OutOfMemoryError
from engine.model.parameters import parameter_table
from engine.optim.optimizer import ShardedAdamW
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import Layout
from engine.plan.memory import GIB, MemoryEstimate, estimate, require_fit
from engine.testing.distributed import world_of
from engine.testing.runs import run_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_is_what_training_allocates(tmp_path, dtype):
    config = run_config(tmp_path, "--model.hidden_size", "256", "--model.intermediate_size", "512")
    expected = estimate(config, Layout(), 0, dtype, "cpu")
    parameters = ShardedParameters(parameter_table(config.model), dtype, world_of())
    optimizer = ShardedAdamW(parameters, OptimizerConfig())

    def size(*tensors: torch.Tensor) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    weights = [bucket.param for bucket in parameters.buckets]
    states = [tensor for shard in optimizer.shards for tensor in shard.kinds.values()]
    assert size(*weights) == pytest.approx(expected.parameters, rel=0.01)
    assert size(*(bucket.grad for bucket in parameters.buckets)) == pytest.approx(expected.gradients, rel=0.01)
    assert size(*weights, *states) == pytest.approx(expected.parameters + expected.optimizer, rel=0.01)


def test_more_ranks_shard_the_optimizer(tmp_path):
    config = run_config(tmp_path, "--batch.global", "8")
    table = parameter_table(config.model)
    one, eight = (estimate(config, Layout(dp=dp), 0, torch.bfloat16, "cpu") for dp in (1, 8))
    assert one.optimizer == table.num_parameters * 12
    assert eight.optimizer == one.optimizer // 8
    assert (one.parameters, one.gradients, one.activations) == (eight.parameters, eight.gradients, eight.activations)


def test_what_does_not_fit_is_refused_with_the_numbers():
    require_fit(MemoryEstimate(2 * GIB, 0, 0, 0, 0), 2 * GIB, "this GPU")
    with pytest.raises(OutOfMemoryError, match=r"optimizer 2\.0.*this GPU has 2\.0 GiB"):
        require_fit(MemoryEstimate(1 << 20, 0, 2 * GIB, 0, 0), 2 * GIB, "this GPU")
