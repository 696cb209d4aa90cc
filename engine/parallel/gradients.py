"""Where gradients go: into flat fp32 main gradients, at once or later.

A layer that multiplies by a trained weight does not return that weight's gradient to autograd but hands over its two
factors: the product is added straight to the main gradient, and a zero-bubble schedule can put it off to a moment at
which the rank would have waited. Rejected: taking autograd's graph apart into an input half and a weight half (it
walks private structures for every microbatch).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from engine.parallel.fp8 import Fp8Layer


class GradientFlow:
    """What happens to gradients in the backward pass that is running.

    Attributes:
        last: this pass is the last to reach the parameters in it, so that a gradient that arrives is complete.
        postponed: None, or the products of weight gradients that have been put off.
        completed: called with each parameter whose gradient is complete.
    """

    def __init__(self, completed: Callable[["TrainedParameter"], None]) -> None:
        self.last = False
        self.postponed: list[Callable[[], None]] | None = None
        self.completed = completed

    def arrived(self, parameter: "TrainedParameter") -> None:
        if self.last:
            self.completed(parameter)


class TrainedParameter(nn.Parameter):
    """A trainable tensor whose gradients are added to `main_grad`, fp32 and of its shape.

    Attributes:
        fp8: how its layer multiplies in FP8, or None where it does not.
    """

    main_grad: Tensor
    flow: GradientFlow
    fp8: Union["Fp8Layer", None] = None

    @staticmethod
    def of(values: Tensor, main_grad: Tensor, flow: GradientFlow) -> "TrainedParameter":
        parameter = TrainedParameter(values)
        parameter.main_grad, parameter.flow = main_grad, flow
        parameter.register_post_accumulate_grad_hook(_take_gradient)
        return parameter

    def add_product(self, add: Callable[[Tensor], None]) -> None:
        """Have `add` add a gradient to the main gradient that it is given, now or when the schedule says so."""

        def run() -> None:
            add(self.main_grad)
            self.flow.arrived(self)

        if self.flow.postponed is None:
            run()
        else:
            self.flow.postponed.append(run)

    def add_gradient(self, grad: Tensor) -> None:
        """Add a gradient, of any dtype, to the main gradient now."""
        self.main_grad.add_(grad)
        self.flow.arrived(self)


@torch.no_grad()
def _take_gradient(parameter: Tensor) -> None:
    """For gradients that do come through autograd: biases, embedding and head, and norms where no kernel sums theirs in
    fp32. It is also called where a layer has handed over its gradient, and then there is none."""
    assert isinstance(parameter, TrainedParameter)
    if parameter.grad is None:
        return
    grad, parameter.grad = parameter.grad, None
    parameter.add_gradient(grad)
