import pytest
import torch
import torch.nn.functional as F

from engine.ops import cross_entropy
from engine.ops.cross_entropy import chunk_rows, linear_cross_entropy, linear_cross_entropy_reference
from tests.ops.op_parity import FP32, assert_same


@pytest.fixture(autouse=True, params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param == "many chunks":
        monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS_CPU", 1)  # 64 tokens at a time


def example(tokens: int, hidden: int = 24, vocab: int = 101) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    mask = (torch.rand(tokens) > 0.3).float()
    labels = torch.randint(0, vocab, (tokens,))
    return torch.randn(tokens, hidden), torch.randn(vocab, hidden) / 3, labels, mask


def both(labels: torch.Tensor, mask: torch.Tensor) -> tuple:
    return (
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, mask),
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, labels, mask),
    )


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 200])
def test_equals_its_reference(tokens):
    hidden, weight, labels, mask = example(tokens)
    assert_same(*both(labels, mask), [hidden, weight], torch.tensor(0.37), **FP32)


def test_large_products_equal_the_reference():
    hidden, weight, labels, mask = example(600, 128, 1003)  # these go through oneDNN
    assert_same(*both(labels, mask), [hidden, weight], **FP32)


def test_equals_pytorch():
    hidden, weight, labels, mask = example(130)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")[mask > 0].sum()
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, mask), expected)


@pytest.mark.parametrize("masked_label", [-100, -1, 0, 100])
def test_labels_do_not_matter_where_masked(masked_label):
    hidden, weight, labels, mask = example(130)
    op = both(labels.where(mask > 0, masked_label), mask)[0]
    assert_same(op, both(labels, mask)[1], [hidden, weight], **FP32)


def test_fully_masked_is_zero_with_zero_gradients():
    hidden, weight, _, mask = example(130)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((130,), -100), torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_gradients_in_double():
    """gradcheck goes backwards many times, so it proves the reference, and the reference the fast path."""
    hidden, weight, labels, mask = example(70, 3, 5)
    inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    fast, reference = both(labels, mask)
    assert torch.autograd.gradcheck(reference, inputs)
    assert_same(fast, reference, inputs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which):
    hidden, weight, labels, mask = example(130)
    inputs = [hidden.clone(), weight.clone()]
    inputs[which].requires_grad_()
    linear_cross_entropy(*inputs, labels, mask).backward()
    assert inputs[1 - which].grad is None
    expected = [hidden.requires_grad_(), weight.requires_grad_()]
    linear_cross_entropy_reference(*expected, labels, mask).backward()
    torch.testing.assert_close(inputs[which].grad, expected[which].grad, **FP32)


def test_gradients_can_be_taken_once():
    hidden, weight, labels, mask = example(5)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_evaluation_computes_no_gradients(monkeypatch):
    hidden, weight, labels, mask = example(130)
    products = []
    product = cross_entropy.matmul_transposed
    monkeypatch.setattr(cross_entropy, "matmul_transposed", lambda *ab: products.append(ab) or product(*ab))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, mask)
    assert len(products) == -(-130 // min(130, chunk_rows(101, "cpu")))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, labels, mask).detach())


@pytest.mark.parametrize("where", [0, 129])
def test_nan_stays_nan(where):
    hidden, weight, labels, mask = example(130)
    hidden[where, 0] = torch.nan
    assert linear_cross_entropy(hidden, weight, labels, torch.ones_like(mask)).isnan()


def test_extreme_logits():
    """Losses beyond the range of exp, and a sure prediction."""
    hidden, weight = torch.eye(3) * 500, torch.eye(3) * 2
    labels = torch.tensor([0, 2, 1])
    assert_same(*both(labels, torch.ones(3)), [hidden, weight], **FP32)
    assert linear_cross_entropy(hidden, weight, labels, torch.ones(3)) == 2000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_fp32_loss(dtype):
    hidden, weight, labels, mask = example(200)
    inputs = [hidden.to(dtype), weight.to(dtype)]
    assert linear_cross_entropy(*inputs, labels, mask).dtype == torch.float32
    assert_same(*both(labels, mask), inputs, rtol=2e-2, atol=5e-2)


def test_chunks_are_whole_tiles_of_bounded_size(monkeypatch):
    monkeypatch.undo()
    assert chunk_rows(32000, "cpu") == 256
    assert chunk_rows(10**9, "cpu") == chunk_rows(10**9, "cuda") == 64
    assert chunk_rows(32000, "cuda") % 64 == 0


def test_never_waits_for_the_device():
    hidden, weight, labels, mask = (x.to("meta") for x in example(130))
    linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, mask).backward()
    assert weight.grad.shape == weight.shape
