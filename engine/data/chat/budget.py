"""The budget of a chat template and the cost of its operations.

One step is at most about 200 ns or 128 bytes. The cost of an operation is computed from its operands and charged before
it runs, so an operation that would exhaust memory is rejected in time.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

from engine.data.chat.errors import TemplateError

BASE_BUDGET = 1_000_000  # steps
STEPS_PER_CHARACTER = 8  # per character of the conversation
CHARACTERS_PER_STEP = 16  # or items of a copied list
STEPS_PER_CALL = 8
LARGEST_INTEGER = 1 << 60  # arithmetic on larger ones costs more than a step, and their hashes can be made to collide
ATTRIBUTE_AT = {  # filters that look up an attribute of each item: position of the argument that names it
    "groupby": 0, "join": 1, "map": 0, "max": 1, "min": 1, "rejectattr": 0, "selectattr": 0, "sort": 2, "unique": 1
}  # fmt: skip
CONTAINERS: Any = (list, tuple, range, type({}.keys()), type({}.values()), type({}.items()))


class Budget:
    """The remaining steps of one rendering, and the two characters that mark generation blocks."""

    def __init__(self, characters: int, marks: tuple[str, str]) -> None:
        self.left = self.full = BASE_BUDGET + STEPS_PER_CHARACTER * characters
        self.marks = marks

    def charge(self, steps: int) -> None:
        """Charge `steps`.

        Raises:
            TemplateError: fewer steps are left.
        """
        self.left -= max(0, steps)
        if self.left < 0:
            raise TemplateError(
                f"the chat template loops forever or grows without bound: it needs more than the {self.full:,} steps "
                f"allowed for this conversation; use another template"
            )

    def charge_characters(self, count: int) -> None:
        self.charge(1 + count // CHARACTERS_PER_STEP)

    def charge_value(self, value: Any) -> None:
        """Charge for reading a value and everything in it."""
        if isinstance(value, str):
            self.charge(1 + len(value) // CHARACTERS_PER_STEP)
        elif isinstance(value, dict):
            self.charge_value(value.items())
        elif isinstance(value, CONTAINERS):
            self.charge(1 + len(value))
            for item in value:
                self.charge_value(item)
        elif isinstance(value, Namespace):  # reachable through a filter's attribute name
            self.charge_value(value._Namespace__attrs)
        elif isinstance(value, LoopContext):
            raise TemplateError("the chat template computes with a loop itself; use another template")

    def counted(self, items: Iterable[Any], steps: int) -> Iterator[Any]:
        """Yield `items`, charging `steps` for each."""
        for item in items:
            self.charge(steps)
            yield item

    def listed(self, value: Any) -> Any:
        """Convert an iterator to a list, which can be charged for; return other values unchanged."""
        return list(self.counted(value, 1)) if isinstance(value, (Iterator, range)) else value

    def charge_widths(self, text: str) -> None:
        """Charge for the widths in a format string: `%999d`, `{:>999}`."""
        self.charge_characters(sum(map(int, re.findall(r"\d{1,19}", text))))


def charge_filter(budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge for a filter whose cost or result grows faster than its operands."""
    size = len(value) if hasattr(value, "__len__") else 1
    if name in ATTRIBUTE_AT:
        path = str(argument_of(args, kwargs, ATTRIBUTE_AT[name], "attribute", ""))
        budget.charge(STEPS_PER_CALL * size * (path.count(".") + path.count(",")))
    if name in ("list", "reverse", "unique"):
        budget.charge(size)
    elif name == "wordcount":
        budget.charge(len(str(value)))
    elif name == "trim":
        budget.charge_characters(len(str(value)) * size_of(argument_of(args, kwargs, 0, "chars", "")))
    elif name in ("dictsort", "groupby", "sort"):
        budget.charge(size * size.bit_length())
        for _ in range(size.bit_length()):
            budget.charge_value(value)
    elif name == "join":
        budget.charge_characters(size * len(str(argument_of(args, kwargs, 0, "d", ""))))
    elif name == "indent":
        width = argument_of(args, kwargs, 0, "width", 4)
        budget.charge_characters((len(str(value).splitlines()) + 1) * size_of(width))
    elif name == "format":
        charge_operator(budget, "%", str(value), kwargs or args)
    elif name == "replace":
        old, new = (str(argument_of(args, kwargs, i, key, "")) for i, key in enumerate(("old", "new")))
        budget.charge_characters(str(value).count(old) * len(new))
    elif name == "round":
        budget.charge(abs(int(argument_of(args, kwargs, 0, "precision", 0))) ** 2)


def charge_string_method(budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge for reading the text and for the result of the method."""
    budget.charge_value(text)
    if name in ("split", "rsplit", "splitlines"):
        budget.charge(len(text))
    if name.startswith(("r", "strip", "lstrip")):  # search from the end, or compare character by character
        budget.charge_characters(len(text) * size_of(argument_of(args, kwargs, 0, "sep", 0)))
    if name == "join" and args:
        budget.charge_characters(len(text) * len(args[0]))
    elif name in ("center", "ljust", "rjust", "zfill"):
        budget.charge_characters(size_of(argument_of(args, kwargs, 0, "width", 0)))
    elif name == "expandtabs":
        budget.charge_characters(text.count("\t") * size_of(argument_of(args, kwargs, 0, "tabsize", 8)))
    elif name == "replace" and len(args) > 1:
        budget.charge_characters(text.count(args[0]) * len(args[1]))


def charge_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge for the result of `left operator right`."""
    if operator == "%" and isinstance(left, str):
        before = budget.left
        budget.charge_value((left, right))
        budget.charge((before - budget.left) * left.count("%("))  # every `%(name)` can write the whole mapping
        budget.charge_widths(left)
        if "*" in left:
            budget.charge_characters(
                sum(abs(i) for i in (right if isinstance(right, tuple) else ()) if isinstance(i, int))
            )
        return
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        budget.charge(left.bit_length() * abs(right))
    elif operator == "*":
        many, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(times, int) and isinstance(many, (str, list, tuple)):
            budget.charge_characters(len(many) * max(0, times))
    for operand in (left, right):
        if isinstance(operand, (str, list, tuple)):
            budget.charge_characters(len(operand))


def checked(value: Any) -> Any:
    """Return `value` unchanged.

    Raises:
        TemplateError: it is an integer of `LARGEST_INTEGER` or more.
    """
    if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
        raise TemplateError(f"the chat template computes a number of {value.bit_length()} bits; use another template")
    return value


def charge_json_whitespace(budget: Budget, value: Any, indent: int, separators: int, depth: int = 1) -> None:
    """Charge for the whitespace and separators around each item in JSON."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in items:
        budget.charge_characters(depth * indent + separators)
        charge_json_whitespace(budget, item, indent, separators, depth + 1)


def argument_of(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    """Return a call's argument, given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def size_of(value: Any) -> int:
    """Return the number of characters of a width or separator."""
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 1
