import pytest
import torch

from engine.ops.norm import rms_norm
from engine.parallel.gradients import GradientFlow, GradientSink, add_together, trained_parameter
from engine.parallel.layout import NO_TP
from engine.parallel.tensor import column_linear, row_linear


class Model:
    """A norm, two layers and a bias; `completed` has the names of the parameters in the order of their completion."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.completed: list[str] = []
        self.flow = GradientFlow(self.completed.append)
        shapes = {"norm": (6,), "up": (9, 6), "bias": (9,), "down": (6, 9)}
        values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.plain = {name: value.clone().requires_grad_() for name, value in values.items()}
        self.sinks = {
            name: GradientSink(name, torch.zeros_like(value, dtype=torch.float32), self.flow)
            for name, value in values.items()
        }
        self.trained = {name: trained_parameter(value.to(dtype), self.sinks[name]) for name, value in values.items()}
        self.inputs = torch.randn(3, 5, 6, dtype=torch.float64)

    def loss(self, parameters: dict, x: torch.Tensor, sinks: dict[str, GradientSink]) -> torch.Tensor:
        x = rms_norm(x, parameters["norm"], 1e-6)
        up = column_linear(x, parameters["up"], parameters["bias"], NO_TP, sinks.get("up"))
        return row_linear(up.tanh(), parameters["down"], None, NO_TP, sinks.get("down")).square().sum()

    def backward(self, inputs: int) -> None:
        dtype = self.trained["norm"].dtype
        self.loss(self.trained, self.inputs[inputs].to(dtype), self.sinks).backward()

    def expected(self, passes: int = 3) -> dict[str, torch.Tensor]:
        sum(self.loss(self.plain, x, {}) for x in self.inputs[:passes]).backward()
        return {name: parameter.grad.float() for name, parameter in self.plain.items()}

    def assert_gradients(self, passes: int = 3, **tolerance: float) -> None:
        for name, gradient in self.expected(passes).items():
            assert self.trained[name].grad is None
            assert self.sinks[name].main_grad.dtype == torch.float32
            torch.testing.assert_close(self.sinks[name].main_grad, gradient, **tolerance)


def test_gradients_of_all_kinds_add_up_in_fp32():
    model = Model()
    for inputs in range(3):
        model.backward(inputs)
    model.assert_gradients(rtol=1e-5, atol=1e-5)


def test_bf16_parameters_have_fp32_gradients():
    """The sum of many small gradients does not get stuck, as it would in bf16."""
    model = Model(torch.bfloat16)
    for _ in range(600):
        model.backward(0)
    once = Model(torch.bfloat16)
    once.backward(0)
    for name, sink in model.sinks.items():
        torch.testing.assert_close(sink.main_grad, 600 * once.sinks[name].main_grad, rtol=1e-4, atol=1e-3)


def test_gradients_are_complete_in_the_last_pass_only():
    model = Model()
    model.backward(0)
    model.backward(1)
    assert model.completed == []
    model.flow.is_last_pass = True
    model.backward(2)
    assert model.completed == ["down", "bias", "up", "norm"]


def test_matmuls_can_be_postponed():
    model = Model()
    postponed = []
    for inputs in range(3):
        model.flow.is_last_pass, model.flow.postponed = inputs == 2, []
        model.backward(inputs)
        postponed.append(model.flow.postponed)
        model.flow.is_last_pass, model.flow.postponed = False, None
    assert [len(matmuls) for matmuls in postponed] == [2, 2, 2]
    assert not any(model.sinks[name].main_grad.any() for name in ("up", "down"))
    assert model.completed == ["bias", "norm"]  # autograd has brought these; only matmuls wait
    for number, matmuls in enumerate(postponed):
        model.flow.is_last_pass = number == 2
        for matmul in matmuls:
            matmul()
    assert model.completed == ["bias", "norm", "down", "up"]
    model.assert_gradients(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("postpone", [False, True])
def test_the_first_addition_of_a_step_overwrites_the_gradient_of_the_last(postpone):
    model = Model()
    for sink in model.sinks.values():
        sink.main_grad.fill_(torch.nan)
    model.flow.step += 1
    postponed = []
    for inputs in range(3):
        model.flow.postponed = [] if postpone else None
        model.backward(inputs)
        postponed.append(model.flow.postponed)
    for matmul in (matmul for matmuls in reversed(postponed) for matmul in matmuls or ()):
        matmul()
    model.assert_gradients(rtol=1e-5, atol=1e-5)


def test_rows_are_added_to_zeros_and_what_gets_nothing_is_zeroed():
    flow = GradientFlow(lambda path: None)
    rows, nothing = (GradientSink(path, torch.full((3, 2), torch.nan), flow) for path in ("rows", "nothing"))
    flow.step += 1
    for _ in range(2):
        rows.add_to_rows(lambda grad: grad[1].add_(1.0))
    for sink in (rows, nothing):
        sink.zero_unless_added_to()
    assert rows.main_grad.tolist() == [[0, 0], [2, 2], [0, 0]]
    assert not nothing.main_grad.any()


def test_gradients_that_one_op_adds_to_overwrite_first_and_are_complete_in_the_last_pass():
    completed: list[str] = []
    flow = GradientFlow(completed.append)
    sinks = [GradientSink(path, torch.full((2,), torch.nan), flow) for path in ("weight", "bias")]
    flow.step += 1
    flow.postponed = []  # these do not wait
    seen = []
    for flow.is_last_pass in (False, True):

        def add(main_grads, accumulate):
            seen.append(accumulate)
            for grad in main_grads:
                grad.copy_(grad + 1 if accumulate else torch.ones(2))
            return len(seen)

        assert add_together(sinks, add) == len(seen)
        assert completed == (["weight", "bias"] if flow.is_last_pass else [])
    assert seen == [False, True]
    assert all(sink.main_grad.tolist() == [2, 2] for sink in sinks)
    assert not flow.postponed
