"""Where gradients go: into flat fp32 main gradients, at once or later.

A layer that multiplies by a trained weight does not return that weight's gradient to autograd but hands the two factors
to the weight's `GradientSink`: the matmul accumulates straight into the main gradient, and a zero-bubble schedule can
postpone it to a moment at which the rank would have idled. Alternative considered: splitting autograd's graph into an
input half and a weight half (it walks private structures for every microbatch).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class GradientFlow:
    """State of the running backward pass, shared by all gradient sinks of a rank.

    Attributes:
        is_last_pass: no later pass of this step reaches these parameters, so a gradient that arrives is complete.
        postponed: None, or the list that collects postponed weight-gradient matmuls.
        completed: called with the path of each parameter whose gradient is complete.
    """

    def __init__(self, completed: Callable[[str], None]) -> None:
        self.is_last_pass = False
        self.postponed: list[Callable[[], None]] | None = None
        self.completed = completed


class GradientSink:
    """Accumulates the gradient of one parameter.

    Attributes:
        path: of the parameter, in the parameter table.
        main_grad: fp32, of the parameter's shape; a view of a gradient bucket.
    """

    def __init__(self, path: str, main_grad: Tensor, flow: GradientFlow) -> None:
        self.path = path
        self.main_grad = main_grad
        self.flow = flow

    def add(self, grad: Tensor) -> None:
        """Add a gradient, of any floating dtype, to the main gradient now."""
        self.main_grad.add_(grad)
        self._arrived()

    def add_matmul(self, matmul: Callable[[Tensor], None]) -> None:
        """Let `matmul` accumulate into the main gradient that it is given, now or when the schedule says so."""

        def run() -> None:
            matmul(self.main_grad)
            self._arrived()

        if self.flow.postponed is None:
            run()
        else:
            self.flow.postponed.append(run)

    def _arrived(self) -> None:
        if self.flow.is_last_pass:
            self.flow.completed(self.path)


def trained_parameter(values: Tensor, sink: GradientSink) -> nn.Parameter:
    """`values` as a parameter whose gradient goes to `sink` also where it comes through autograd: those of biases,
    embedding and head, and of norms where no kernel sums theirs in fp32.
    """
    parameter = nn.Parameter(values)

    @torch.no_grad()
    def take(accumulated: Tensor) -> None:
        if accumulated.grad is not None:  # None where a layer has handed its gradient to the sink
            grad, accumulated.grad = accumulated.grad, None
            sink.add(grad)

    parameter.register_post_accumulate_grad_hook(take)
    return parameter
