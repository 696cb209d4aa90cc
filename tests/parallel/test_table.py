import numpy as np
import pytest
import torch

from engine.parallel.table import LocalParameter, LogicalTensor, Rectangle, initialize


def whole(name: str, *shape: int, mean: float = 0.0, std: float = 0.0) -> LogicalTensor:
    return LogicalTensor(name, shape, Rectangle((0,) * len(shape), shape), True, True, mean, std)


def splitmix_normal(name: str, count: int, seed: int) -> np.ndarray:
    """The same function in numpy's unsigned arithmetic."""
    import hashlib

    key = np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little"))
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    uniform = ((x >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    angle = (x & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * np.pi * 2.0**-32)
    return np.sqrt(-2 * np.log(uniform)) * np.cos(angle)


def values(*tensors: LogicalTensor, seed: int = 3) -> torch.Tensor:
    parameter = LocalParameter("p", tensors)
    out = torch.empty(parameter.shape, dtype=torch.float64)
    initialize(parameter, out, seed)
    return out


def test_initial_values_match_an_independent_implementation():
    out = values(whole("a.weight", 30, 70, std=0.5))
    np.testing.assert_allclose(out.flatten().numpy(), 0.5 * splitmix_normal("a.weight", 2100, 3), rtol=1e-12)


def test_a_rectangle_has_the_values_of_the_whole():
    full = values(whole("a.weight", 30, 70, std=1.0))
    part = LogicalTensor("a.weight", (30, 70), Rectangle((11, 20), (7, 33)), True, True, 0.0, 1.0)
    assert torch.equal(values(part), full[11:18, 20:53])


def test_values_depend_on_the_name_and_the_seed_and_not_on_neighbors():
    a, b = whole("a.weight", 8, 16, std=1.0), whole("b.weight", 4, 16, std=1.0)
    fused = values(a, b)
    assert torch.equal(fused[:8], values(a))
    assert torch.equal(fused[8:], values(b))
    assert not torch.equal(values(a)[:4], values(b))
    assert not torch.equal(values(a), values(a, seed=4))


def test_large_tensors_are_normal_and_chunks_do_not_repeat():
    out = values(whole("big", 3000, 1000, std=2.0))
    assert abs(out.mean()) < 0.01
    assert abs(out.std() - 2.0) < 0.01
    assert out.abs().max() > 8.0  # has tails
    assert len(torch.unique(out[:, 0])) == 3000


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_constants(mean):
    assert torch.equal(values(whole("norm", 5, mean=mean)), torch.full((5,), mean, dtype=torch.float64))
