"""Rewrites a parsed chat template so that its operations are charged to the budget.

Iterations, comparisons, slices and concatenations are wrapped in filters of the sandbox that charge for them. The cost
of a loop body is computed once, at compile time.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from engine.data.chat.budget import CHARACTERS_PER_STEP, checked
from engine.data.chat.errors import TemplateError

_REFUSED_NODES = (nodes.Extends, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport, nodes.EvalContextModifier)


class Metering(NodeTransformer):
    """Rewrites a parsed template so that its operations are charged to the budget."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if isinstance(node, _REFUSED_NODES):
            raise TemplateError(
                f"the chat template uses {type(node).__name__.lower()} (line {node.lineno}); "
                f"expected a self-contained template"
            )
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        steps = _steps([*node.body, *([node.test] if node.test else [])])
        others = _steps(node.else_)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "counted", steps)
        if node.recursive:  # `loop(...)` runs the body on uncounted items
            paid = nodes.Not(_paid(steps, node), lineno=node.lineno)
            node.test = nodes.And(paid, node.test, lineno=node.lineno) if node.test else paid
            if node.else_:
                node.else_.insert(0, nodes.ExprStmt(_paid(others, node), lineno=node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._charge_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._charge_body(node)

    def _charge_body(self, node: Any) -> nodes.Node:
        steps = _steps([*node.body, *node.defaults])
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_paid(steps, node), lineno=node.lineno))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Charge for both operands, except in an equality test with a constant, whose size bounds the cost."""
        self.generic_visit(node)
        first = node.ops[0]
        if not (first.op in ("eq", "ne") and isinstance(first.expr, nodes.Const) and len(node.ops) == 1):
            node.expr = _filter(node.expr, "charge_value")
            for operand in node.ops:
                operand.expr = _filter(operand.expr, "charge_value")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filter(part, "charge_value") for part in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "sliced")
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        checked(node.value)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _filter(node.key, "keyed")
        return node


def _filter(node: Any, name: str, *arguments: int) -> nodes.Filter:
    constants: list[nodes.Expr] = [nodes.Const(argument, lineno=node.lineno) for argument in arguments]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _paid(steps: int, node: nodes.Node) -> nodes.Filter:
    """Return an expression that charges `steps` and evaluates to None."""
    return _filter(nodes.Const(steps, lineno=node.lineno), "charge")


def _steps(body: Sequence[nodes.Node]) -> int:
    """Return the maximum cost of running `body` once, without nested bodies, which are charged separately."""
    steps, rest = 1, list(body)
    while rest:
        node = rest.pop()
        steps += 1
        if isinstance(node, nodes.TemplateData):
            steps += len(node.data) // CHARACTERS_PER_STEP
        pays_itself = isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock))
        rest += node.iter_child_nodes(("body",) if pays_itself else None)
    return steps
