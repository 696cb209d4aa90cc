"""Where gradients go: into flat fp32 main gradients, at once or later.

A layer that multiplies by a trained weight does not return that weight's gradient to autograd but hands the two factors
to the weight's `GradientSink`: the matmul accumulates straight into the main gradient, and a zero-bubble schedule can
postpone it to a moment at which the rank would have idled. Alternative considered: splitting autograd's graph into an
input half and a weight half (it walks private structures for every microbatch).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from engine.ops.linear import add_or_copy

_T = TypeVar("_T")


class GradientFlow:
    """State of the running backward pass, shared by all gradient sinks of a rank.

    Attributes:
        step: a number that changes from step to step, by which sinks know the gradients of the last one.
        is_last_pass: no later pass of this step reaches these parameters, so a gradient that arrives is complete.
        postponed: None, or the list that collects postponed weight-gradient matmuls.
        completed: called with the path of each parameter whose gradient is complete.
    """

    def __init__(self, completed: Callable[[str], None]) -> None:
        self.step = 0
        self.is_last_pass = False
        self.postponed: list[Callable[[], None]] | None = None
        self.completed = completed


class GradientSink:
    """Accumulates the gradient of one parameter. The first addition of a step overwrites what the last step left.

    Attributes:
        path: of the parameter, in the parameter table.
        main_grad: fp32, of the parameter's shape; a view of a gradient bucket.
    """

    def __init__(self, path: str, main_grad: Tensor, flow: GradientFlow) -> None:
        self.path = path
        self.main_grad = main_grad
        self.flow = flow
        self._step = flow.step  # of the main gradient

    def add(self, grad: Tensor) -> None:
        """Add a gradient, of any floating dtype, to the main gradient now."""
        add_or_copy(self.main_grad, grad, self._accumulates())
        self.arrived()

    def add_to_rows(self, add: Callable[[Tensor], None]) -> None:
        """Let `add` add to some rows of the main gradient now."""
        self.zero_unless_added_to()
        add(self.main_grad)
        self.arrived()

    def add_matmul(self, matmul: Callable[[Tensor, bool], None]) -> None:
        """Let `matmul(main_grad, accumulate)` add to the main gradient, or overwrite it unless `accumulate`, now or
        when the schedule says so.
        """

        def run() -> None:
            matmul(self.main_grad, self._accumulates())
            self.arrived()

        if self.flow.postponed is None:
            run()
        else:
            self.flow.postponed.append(run)

    def add_in_forward(self, matmul: Callable[[Tensor, bool], None]) -> None:
        """As `add_matmul`, in the forward pass: now, and `arrived` follows in the backward pass."""
        matmul(self.main_grad, self._accumulates())

    def arrived(self) -> None:
        """Report the gradient as complete if this is the last backward pass of the step."""
        if self.flow.is_last_pass:
            self.flow.completed(self.path)

    def zero_unless_added_to(self) -> None:
        """Zero the main gradient if nothing has been added to it in this step."""
        if not self._accumulates():
            self.main_grad.zero_()

    def _accumulates(self) -> bool:
        """Whether something was added in this step already; from now on it was."""
        before, self._step = self._step, self.flow.step
        return before == self.flow.step


def add_together(sinks: Sequence[GradientSink], add: Callable[[Sequence[Tensor], bool], _T]) -> _T:
    """Let `add(main_grads, accumulate)` add to the main gradients of `sinks`, or overwrite them unless `accumulate`,
    now; return its result. Nothing else adds to only some of them.
    """
    (accumulate,) = {sink._accumulates() for sink in sinks}
    result = add([sink.main_grad for sink in sinks], accumulate)
    for sink in sinks:
        sink.arrived()
    return result


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
