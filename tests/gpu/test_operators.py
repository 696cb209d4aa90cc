"""The operators as torch sees them on a GPU: schemas, fake tensors, streams, graphs."""

import pytest
import torch

from tests.csrc.test_operators import cases, test_opcheck  # noqa: F401

ops = torch.ops.triaxis
ONE_TENTH_OF_A_SECOND = 200_000_000  # in clock cycles of about 2 GHz


def leaves(values):
    """Copies of the tensors among arguments or results, as bytes."""
    flat = [values] if isinstance(values, torch.Tensor) else [x for x in values or () if isinstance(x, torch.Tensor)]
    return [x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for x in flat]


@pytest.mark.parametrize("name", sorted(cases()))
def test_runs_on_the_current_stream(emulated, name):
    """The inputs are written late on another stream: a kernel that does not wait for it reads zeros."""
    operator = getattr(ops, name)
    for arguments in cases()[name]:
        late = [torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        given = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        expected = leaves(operator(*given)) + leaves(given)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(ONE_TENTH_OF_A_SECOND)
            for x, value in zip(late, arguments, strict=True):
                if isinstance(x, torch.Tensor):
                    x.copy_(value)
            got = leaves(operator(*late)) + leaves(late)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", sorted(cases()))
def test_replays_in_a_graph(emulated, name):
    """Captured once and replayed: nothing waits for the device or keeps a pointer."""
    operator = getattr(ops, name)
    for arguments in cases()[name]:
        held = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        expected = leaves(operator(*held)) + leaves(held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = operator(*held)
        for x, value in zip(held, arguments, strict=True):
            if isinstance(x, torch.Tensor):
                x.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        got = leaves(results) + leaves(held)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
