import pytest
import torch

from engine.ops import linear as linear_module
from engine.ops.linear import (
    MATMUL_KINDS,
    add_grad_weight,
    grad_weight,
    linear,
    linear_reference,
    matmul_transposed,
    measure_onednn,
    measured_key,
    parse_onednn,
    uses_onednn,
)
from tests.ops.op_parity import BF16, assert_same, strided

LARGE = [(130, 257, 129), (2048, 64, 192), (64, 192, 1024), (17, 512, 256)]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), LARGE)
def test_onednn_equals_pytorch(rows, inputs, outputs):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    assert uses_onednn(x, weight)
    # sums of up to 2048 products of unit variance, added in another order
    assert_same(linear, linear_reference, [x, weight, bias], torch.randn(rows, outputs), rtol=1e-5, atol=2e-4)
    assert_same(linear, linear_reference, [x, weight], strided(rows, outputs), rtol=1e-5, atol=2e-4)


def test_more_dimensions_than_two():
    torch.manual_seed(0)
    inputs = [torch.randn(5, 26, 257), torch.randn(129, 257), torch.randn(129)]
    assert_same(linear, linear_reference, inputs, torch.randn(5, 26, 129), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("rows", [0, 1, 15])
def test_small_matmuls_stay_with_pytorch(rows):
    inputs = [torch.randn(rows, 512), torch.randn(2048, 512), torch.randn(2048)]
    assert not uses_onednn(*inputs[:2])
    assert_same(linear, linear_reference, inputs, rtol=0, atol=0)


def test_other_dtypes_stay_with_pytorch():
    inputs = [torch.randn(130, 257), torch.randn(129, 257) / 16]
    assert not uses_onednn(*(x.double() for x in inputs))
    assert not uses_onednn(*(x.bfloat16() for x in inputs))
    assert not uses_onednn(*(x.to("meta") for x in inputs))
    assert_same(linear, linear_reference, [x.bfloat16() for x in inputs], rtol=2e-2, atol=BF16["atol"])


@pytest.mark.parametrize("view", ["plain", "transposed", "rows with gaps", "columns with gaps"])
def test_operands_of_any_layout(view):
    torch.manual_seed(0)

    def operand(rows: int, columns: int) -> torch.Tensor:
        return {
            "plain": torch.randn(rows, columns),
            "transposed": torch.randn(columns, rows).t(),
            "rows with gaps": strided(rows, columns),
            "columns with gaps": strided(columns, rows).t(),
        }[view]

    a, b = operand(130, 257), operand(129, 257)
    expected = (a.double() @ b.double().t()).float()
    torch.testing.assert_close(matmul_transposed(a, b), expected, rtol=1e-5, atol=1e-4)


def test_only_the_wanted_gradients_are_computed():
    x, weight = torch.randn(130, 257), torch.randn(129, 257, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(130, 257, 129), (130, 129, 257), (1, 5, 3), (0, 5, 3)])
def test_weight_gradients_add_up(dtype, tokens, outputs, inputs):
    torch.manual_seed(0)
    grads, xs = (torch.randn(2, tokens, size).to(dtype) for size in (outputs, inputs))
    out = before = torch.full((outputs, inputs), 7.0)
    for grad, x in zip(grads, xs, strict=True):
        add_grad_weight(out, grad, x)
    assert out is before
    assert out.dtype == torch.float32
    expected = 7 + torch.einsum("cto,cti->oi", grads.double(), xs.double()).float()
    # a bf16 matmul is rounded once before it is added
    tolerance = {"rtol": 1e-5, "atol": 2e-4} if dtype == torch.float32 else {"rtol": BF16["rtol"], "atol": 0.3}
    torch.testing.assert_close(out, expected, **tolerance)


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 3), (3, 5), (257, 129), (129, 257)])
def test_the_weight_gradient_is_that_of_autograd(outputs, inputs):
    torch.manual_seed(0)
    x, weight = torch.randn(130, inputs), torch.randn(outputs, inputs, requires_grad=True)
    grad = torch.randn(130, outputs)
    linear_reference(x, weight).backward(grad)
    torch.testing.assert_close(grad_weight(grad, x), weight.grad, rtol=1e-5, atol=2e-4)


PASSES = {  # size -> operands of `matmul_transposed` in each pass, for tokens, outputs, inputs
    "forward": lambda t, o, i: (torch.randn(t, i), torch.randn(o, i)),
    "input gradient": lambda t, o, i: (torch.randn(t, o), torch.randn(o, i).t()),
    "weight gradient": lambda t, o, i: (torch.randn(t, o).t(), torch.randn(t, i).t()),
}


@pytest.mark.parametrize("size, sizes", [("small", (128, 256, 192)), ("large", (1024, 512, 256))])
@pytest.mark.parametrize("name", PASSES)
def test_the_library_is_chosen_by_kind(monkeypatch, name, size, sizes):
    used = []
    onednn = linear_module._onednn
    monkeypatch.setattr(linear_module, "_onednn", lambda *given: used.append(1) or onednn(*given))
    a, b = PASSES[name](*sizes)
    for kinds, expected in (
        ({f"{size} {name}"}, [1]),
        (MATMUL_KINDS - {f"{size} {name}"}, []),
        (MATMUL_KINDS, [1]),
        ({}, []),
    ):
        used.clear()
        result = matmul_transposed(a, b, frozenset(kinds))
        assert used == expected
        torch.testing.assert_close(result, a @ b.t(), rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("outputs, inputs", [(256, 192), (192, 256)])
def test_weight_gradients_take_the_library_of_their_kind(monkeypatch, outputs, inputs):
    monkeypatch.setattr(linear_module, "_onednn", lambda *given: pytest.fail("oneDNN"))
    grad, x = torch.randn(128, outputs), torch.randn(128, inputs)
    add_grad_weight(torch.zeros(outputs, inputs), grad, x, onednn=MATMUL_KINDS - {"small weight gradient"})
    with pytest.raises(pytest.fail.Exception):
        add_grad_weight(torch.zeros(outputs, inputs), grad, x, onednn=frozenset({"small weight gradient"}))


@pytest.mark.parametrize(
    "fast", [set(), {"large forward"}, {"small weight gradient", "large input gradient"}, MATMUL_KINDS]
)
def test_the_faster_library_of_each_kind_is_found(monkeypatch, fast):
    measured = {}

    def timer(a: torch.Tensor, b: torch.Tensor):
        kind = linear_module._kind(a, b, a.shape[0])
        assert uses_onednn(a, b, frozenset({kind}))  # not one of the smallest, for which nothing is chosen
        measured[kind] = measured.get(kind, 0) + 1
        return lambda onednn: 1.0 if (kind in onednn) == (kind in fast) else 2.0

    monkeypatch.setattr(linear_module, "_timer", timer)
    assert measure_onednn() == fast
    assert measured == dict.fromkeys(MATMUL_KINDS, 1)


def test_what_is_read_from_a_file_is_checked():
    assert parse_onednn(["small forward"]) == {"small forward"}
    assert parse_onednn([]) == frozenset()
    for wrong in (["forward"], ["small forward", "x"], "small forward"):
        with pytest.raises(ValueError, match="are not all of"):
            parse_onednn(wrong)
    with pytest.raises(TypeError):
        parse_onednn(None)


def test_the_key_names_processor_libraries_and_threads(monkeypatch):
    before = measured_key()
    assert before["processor"] and torch.__version__ == before["torch"]
    assert "MKL-DNN v" in before["libraries"] or not linear_module.has_onednn()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert measured_key() == before | {"threads": 99}
