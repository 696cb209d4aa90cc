"""The sandbox that chat templates run in: the names they can call and the cost of each call.

It is the environment that `transformers` gives chat templates, with two additions. Only the names listed here can be
called (methods of strings, lists and dicts, the template's own macros, a few functions), so a template cannot reach
anything outside of the sandbox. Calls, filters, tests and operators are charged to the budget; `metering.py` adds the
charges that require rewriting the template.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Namespace

from engine.data.chat.budget import (
    BASE_BUDGET,
    CONTAINERS,
    STEPS_PER_CALL,
    Budget,
    argument_of,
    charge_filter,
    charge_json_whitespace,
    charge_operator,
    charge_string_method,
    checked,
    size_of,
)
from engine.data.chat.errors import TemplateError

BUDGET = "\0budget"  # the variable that holds the budget; no template can spell its name
LONGEST_KEY = 1000  # characters; looking up a longer attribute name costs more than a step


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LIGHT_FILTERS = _words("count d default first last length")  # constant cost: they do not read their operand's items
_FILTERS = _words("""
    abs capitalize dictsort e escape float format groupby indent int items join list lower map max min reject rejectattr
    replace reverse round safe select selectattr sort string title trim unique upper wordcount
""")
_LIGHT_TESTS = _words("""
    boolean callable defined even false float integer iterable mapping none number odd sameas sequence string true
    undefined
""")
_STRING_METHODS = _words("""
    capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix
    removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper zfill
""")
_REFUSED_TESTS = _words("filter test")  # they hash their operand, possibly a tuple that takes forever to hash
_METHODS: dict[type, frozenset[str]] = {
    list: _words("copy count index"),
    tuple: _words("count index"),
    dict: _words("copy"),
}
_LIGHT_METHODS: dict[type, frozenset[str]] = {
    dict: _words("get items keys values"),
    LoopContext: _words("changed cycle"),
}
_NO_KEYS = (*CONTAINERS, dict)


class _Guarded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, but forbidden attributes and keys raise on access instead of on use."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Reject keys that may take arbitrary time to hash or to print in an error."""
        if isinstance(argument, str):
            if len(argument) > LONGEST_KEY:
                raise SecurityError(f"an index of {len(argument):,} characters")
        elif isinstance(argument, _NO_KEYS):
            raise SecurityError(f"a {type(argument).__name__} as an index")
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As in Jinja, but reject `mapping` of a dict view, a proxy object that `charge_value` cannot charge for."""
        return attr != "mapping" and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Raise immediately instead of when the attribute is used."""
        raise SecurityError(f"it reads {attribute!r} of a {type(obj).__name__}")


class Environment(_Guarded):
    """The chat template environment of transformers, restricted to the names listed above."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # constant expressions run at run time, too, charged to the budget
            finalize=_charge_value,
        )
        self.globals = {
            "range": _range,
            "dict": _make_dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {name: _paid_filter(name) for name in _FILTERS} | {n: FILTERS[n] for n in _LIGHT_FILTERS}
        self.filters |= {
            "tojson": _tojson,
            "charge_value": _charge_value,
            "counted": _counted,
            "charge": _charge,
            "sliced": _sliced,
        }
        self.filters["keyed"] = _keyed
        tests = {name: test for name, test in TESTS.items() if name not in _REFUSED_TESTS}
        self.tests = {name: test if name in _LIGHT_TESTS else _paid_test(name) for name, test in tests.items()}

    def wrap_str_format(self, value: Any) -> Any:
        """Return a placeholder for `str.format`, which `call` runs with the budget."""
        is_method = isinstance(value, (BuiltinMethodType, MethodType)) and isinstance(value.__self__, str)
        return _FormatMethod(value.__self__) if is_method and value.__name__ == "format" else None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        charge_operator(context.parent[BUDGET], operator, left, right)
        return checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (Jinja's names)
        budget: Budget = __context.parent[BUDGET]
        if isinstance(__obj, (Macro, LoopContext)):
            budget.charge(STEPS_PER_CALL + sum(len(a) for a in args if isinstance(a, (str, list, tuple, dict))))
            return __context.call(__obj, *args, **kwargs)
        budget.charge(STEPS_PER_CALL)
        args = tuple(budget.listed(argument) for argument in args)
        budget.charge_value((args, kwargs))
        if isinstance(__obj, _FormatMethod):
            budget.charge_value(__obj.text)
            budget.charge(STEPS_PER_CALL * sum(map(__obj.text.count, "{.[")))  # fields and the parts of their paths
            return _Formatter(__self, budget).vformat(__obj.text, args, kwargs)
        if isinstance(__obj, (BuiltinMethodType, MethodType)):
            _charge_method(budget, __obj, args, kwargs)
        elif not isinstance(__obj, Undefined) and not any(__obj is known for known in __self.globals.values()):
            raise SecurityError(f"a call of {type(__obj).__name__}")
        return __context.call(__obj, *args, **kwargs)


def _charge_method(budget: Budget, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge for a method call.

    Raises:
        SecurityError: the method is not allowed.
    """
    owner, name = method.__self__, method.__name__
    if isinstance(owner, str) and name in _STRING_METHODS:
        charge_string_method(budget, owner, name, args, kwargs)
    elif any(isinstance(owner, kind) and name in allowed for kind, allowed in _LIGHT_METHODS.items()):
        budget.charge(1)
    elif any(isinstance(owner, kind) and name in allowed for kind, allowed in _METHODS.items()):
        budget.charge_value(owner)
    elif not isinstance(owner, _Generation):
        raise SecurityError(f"a call of {type(owner).__name__}.{name}")


class _Formatter(SandboxedFormatter):
    """`str.format` with field widths charged to the budget."""

    def __init__(self, environment: jinja2.Environment, budget: Budget) -> None:
        super().__init__(environment)
        self._budget = budget

    def format_field(self, value: Any, format_spec: str) -> str:
        self._budget.charge_widths(format_spec)
        self._budget.charge_value(value)
        return str(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._budget.charge_value(value)
        return super().convert_field(value, conversion)


class _FormatMethod:
    """The bound method `str.format` of a string."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Namespace(Namespace):
    """Jinja's namespace; rejects names that Python or Jinja looks up on objects."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = _make_dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """The tag `{% generation %} ... {% endgeneration %}`; encloses its content in the budget's marks."""

    tags = {"generation"}  # noqa: RUF012 - as in the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body, lineno=line)

    @pass_context
    def _mark(self, context: Context, caller: Macro) -> str:
        start, end = context.parent[BUDGET].marks
        return f"{start}{caller()}{end}"


def is_generation(node: nodes.Node) -> bool:
    """Whether a node is a `{% generation %}` block."""
    called = node.call.node if isinstance(node, nodes.CallBlock) else None
    return isinstance(called, nodes.ExtensionAttribute) and called.identifier == _Generation.identifier


def generation_in_buffer(tree: nodes.Template) -> bool:
    """Whether the template can read the text of a `{% generation %}` block before it is written."""
    buffers = (nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Macro, nodes.For)
    return any(
        any(map(is_generation, node.find_all(nodes.CallBlock)))
        for node in tree.find_all(buffers)
        if not is_generation(node) and not (isinstance(node, nodes.For) and not node.recursive)
    )


@pass_context
def _charge_value(context: Context, value: Any) -> Any:
    context.parent[BUDGET].charge_value(value)
    return value


@pass_context
def _counted(context: Context, value: Any, steps: int) -> Iterator[Any]:
    counted: Iterator[Any] = context.parent[BUDGET].counted(value, steps)
    return counted


@pass_context
def _charge(context: Context, steps: int) -> None:
    context.parent[BUDGET].charge(steps)


@pass_context
def _keyed(context: Context, value: Any) -> Any:
    context.parent[BUDGET].charge_value(value)
    _check_keys([value])
    return value


@pass_context
def _sliced(context: Context, value: Any) -> Any:
    if isinstance(value, dict):  # it would look up the slice as a key
        raise SecurityError("a slice of a dict")
    context.parent[BUDGET].charge_characters(len(value))
    return value


def _paid_filter(name: str) -> Callable[..., Any]:
    """Wrap a Jinja filter so that it is charged for its operands first, then for each item it yields."""

    @pass_context
    def paid(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.parent[BUDGET]
        budget.charge(STEPS_PER_CALL)
        value = budget.listed(value)
        budget.charge_value((value, args, kwargs))
        charge_filter(budget, name, value, args, kwargs)
        if name == "unique":
            _check_keys(map(make_attrgetter(_PLAIN, argument_of(args, kwargs, 1, "attribute")), value))
        result = _PLAIN.call_filter(name, value, args, kwargs, context=context)
        return budget.counted(result, 1) if isinstance(result, Iterator) else checked(result)

    return paid


def _paid_test(name: str) -> Callable[..., bool]:
    @pass_context
    def paid(context: Context, *operands: Any) -> bool:
        context.parent[BUDGET].charge_value(operands)
        return bool(_PLAIN.call_test(name, operands[0], operands[1:]))

    return paid


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert to JSON as in transformers, without HTML escapes."""
    budget: Budget = context.parent[BUDGET]
    budget.charge_value(value)
    budget.charge_value(separators)
    if indent is not None or separators is not None:
        charge_json_whitespace(budget, value, size_of(indent), sum(map(size_of, separators or ())))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > BASE_BUDGET:
        raise TemplateError(f"the chat template asks for {len(numbers):,} numbers; use another template")
    return numbers


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


@pass_context
def _strftime_now(context: Context, format: str) -> str:
    context.parent[BUDGET].charge_widths(format)
    context.parent[BUDGET].charge(len(format))
    return datetime.now().strftime(format)


def _make_dict(items: Any = (), /, **kwargs: Any) -> dict[Any, Any]:
    pairs = [tuple(pair) for pair in (items.items() if isinstance(items, dict) else items)]
    _check_keys(key for key, _ in pairs)
    return dict(pairs, **kwargs)


def _check_keys(keys: Iterable[Any]) -> None:
    """Reject tuples: colliding hashes would make every lookup compare all keys."""
    if any(isinstance(key, tuple) for key in keys):
        raise SecurityError("a tuple as a key")


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace with the name {name!r}")


_PLAIN = _Guarded()  # runs Jinja's own filters and tests
