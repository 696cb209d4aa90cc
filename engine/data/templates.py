"""Chat templates are programs that come with a model: here they run in a sandbox and on a budget.

The environment is the one that `transformers` gives chat templates. Two things are added. Only what is listed here can
be called: methods of strings, lists and dicts, the template's own macros, a few functions; so there is nothing to
escape with. And whatever a template does is paid from a budget before it happens: an iteration, the characters that an
operator, filter or method reads and writes. The budget grows with the conversation, so that only what grows faster
than its input runs out of it: endless loops, doubled strings, `'a' * 10**9`. The costs of a loop's body are counted
once, when the template is compiled, and a rendering is as good as without them.

Rejected: a limit on time (signals work only in main threads, and neither they nor other threads interrupt a single
long operation), a process per template (pipes cost more than the rendering).
"""

import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from engine.errors import ConfigError

Message = dict[str, Any]
Span = tuple[int, int]  # [start, end) in characters

SOURCE_LIMIT = 1 << 17  # characters; the longest templates in use have a fifth of it
BASE_BUDGET = 2_000_000  # steps, of some 100 ns and 60 bytes at most
STEPS_PER_CHARACTER = 8  # of the conversation
CHARACTERS_PER_STEP = 16
BUDGET = "\0budget"  # the variable that holds it, which no template can spell
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # never text; two of them enclose what the assistant writes

# Filters and tests that look at their operand alone, not at what is in it
_LIGHT_FILTERS = frozenset({"count", "d", "default", "first", "last", "length"})
_FILTERS = frozenset(
    "abs capitalize dictsort e escape float groupby indent int items join list lower map max min reject rejectattr replace "
    "reverse round safe select selectattr sort string title trim unique upper wordcount".split()
)
_LIGHT_TESTS = frozenset(
    "boolean callable defined even false filter float integer iterable mapping none number odd sameas sequence string "
    "test true undefined".split()
)
_STRING_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix "
    "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title "
    "upper zfill".split()
)
_METHODS: dict[type, frozenset[str]] = {
    str: _STRING_METHODS,
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    LoopContext: frozenset({"changed", "cycle"}),
}
_CONTAINERS = (list, tuple, KeysView, ValuesView, ItemsView)
_REFUSED_NODES = (nodes.Extends, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport, nodes.EvalContextModifier)


class TemplateError(ConfigError):
    """The template itself is unusable: it does not parse, tries to escape, loops for ever, grows without bound."""


class ConversationError(ValueError):
    """This conversation cannot be rendered by the template; the text says why, for a person."""


class Budget:
    """What a rendering may still spend, and the two characters that mark what the assistant writes."""

    def __init__(self, characters: int, marks: tuple[str, str]) -> None:
        self.left = self.full = BASE_BUDGET + STEPS_PER_CHARACTER * characters
        self.marks = marks

    def draw(self, steps: int) -> None:
        """Pay for something.

        Raises:
            TemplateError: there is not enough left.
        """
        self.left -= max(0, steps)
        if self.left < 0:
            raise TemplateError(
                f"the chat template loops for ever or grows without bound: it needs more than the {self.full:,} steps "
                f"that this conversation warrants; use another template"
            )

    def draw_characters(self, count: int) -> None:
        self.draw(1 + count // CHARACTERS_PER_STEP)

    def weigh(self, value: Any) -> None:
        """Pay for reading a value and all that it holds."""
        if isinstance(value, str):
            self.draw(1 + len(value) // CHARACTERS_PER_STEP)
        elif isinstance(value, int):
            self.draw_characters(value.bit_length())
        elif isinstance(value, Mapping):
            self.weigh(value.items())
        elif isinstance(value, _CONTAINERS):
            self.draw(1 + len(value))
            for item in value:
                self.weigh(item)

    def counted(self, items: Iterable[Any], steps: int) -> Iterator[Any]:
        """`items`, each of which costs `steps`."""
        for item in items:
            self.draw(steps)
            yield item

    def draw_widths(self, text: str) -> None:
        """Pay for the longest that a format string can make of little: `%999d`, `{:>999}`."""
        self.draw_characters(sum(map(int, re.findall(r"\d{1,19}", text))))


class CompiledTemplate:
    """A template, ready to render any number of conversations, in any thread.

    Raises:
        TemplateError: it is not a template, or uses what a chat template has no business with.
    """

    def __init__(self, source: str) -> None:
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(f"the chat template has {len(source):,} characters, more than {SOURCE_LIMIT:,}")
        environment = _Environment()
        try:
            tree = environment.parse(source)
            self.marks_generation = any(map(_is_generation, tree.find_all(nodes.CallBlock)))
            self._in_buffer = _generation_in_buffer(tree)
            _Metering().visit(tree)
            tree.set_environment(environment)
            self._template = environment.from_string(tree)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not parse: {error} (line {_line(error)})") from None
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise TemplateError(f"the chat template does not compile: {type(error).__name__}: {error}") from None
        self._used = frozenset(NONCHARACTERS).intersection(source)

    def render(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[Span]]:
        """The text, and what `{% generation %}` blocks wrote of it.

        Raises:
            ConversationError: the template cannot render these messages.
            TemplateError: it tries to escape, or spends more than its budget.
        """
        inputs = _PlainData()
        try:
            variables = {"messages": inputs.messages(messages), **inputs.of(variables)}
        except RecursionError:
            raise ConversationError("a message is nested too deep") from None
        unused = [mark for mark in NONCHARACTERS if mark not in self._used | inputs.noncharacters]
        if len(unused) < 2:
            raise ConversationError("the messages hold nearly all Unicode noncharacters, of which two are needed")
        marks = (unused[0], unused[1]) if self.marks_generation else ("", "")
        marked = self._run(variables, Budget(inputs.characters, marks))
        text, spans = _without_marks(marked, marks) if self.marks_generation else (marked, [])
        if self._in_buffer and text != self._run(variables, Budget(inputs.characters, ("", ""))):
            raise TemplateError(
                "the chat template computes with the text of a {% generation %} block; learn another way"
            )
        return text, spans

    def _run(self, variables: Mapping[str, Any], budget: Budget) -> str:
        context = self._template.new_context({**variables, BUDGET: budget})
        try:
            return "".join(self._template.root_render_func(context))
        except TemplateError:
            raise
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"the chat template tries what it must not: {error}") from None
        except (RecursionError, MemoryError) as error:
            raise TemplateError(f"the chat template recurses or grows without bound: {type(error).__name__}") from None
        except jinja2.UndefinedError as error:
            raise ConversationError(f"the template misses something in the conversation: {_short(error)}") from None
        except jinja2.TemplateError as error:  # of raise_exception
            raise ConversationError(_short(error)) from None
        except Exception as error:  # whatever an expression can raise
            raise ConversationError(f"the template fails with {type(error).__name__}: {_short(error)}") from None


class _PlainData:
    """Copies of what a template gets to see, of JSON's types only, and their size."""

    def __init__(self) -> None:
        self.characters = 0
        self.noncharacters: set[str] = set()

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """A key whose value is None counts as absent, as in transformers."""
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise ConversationError(
                "a conversation is a list of messages, one at least, each with `role` and `content`"
            )
        return [self.of({key: value for key, value in message.items() if value is not None}) for message in messages]

    def of(self, value: Any) -> Any:
        self.characters += 1
        if isinstance(value, str):
            self.characters += len(value)
            if not value.isascii():
                self.noncharacters.update(mark for mark in NONCHARACTERS if mark in value)
            return str(value)
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, Mapping):
            return {self.of(key): self.of(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        raise ConversationError(f"a {type(value).__name__} in a message, expected what JSON has")


class _Formatter(SandboxedFormatter):
    """`str.format` whose fields cannot be wider than the budget."""

    def __init__(self, environment: jinja2.Environment, budget: Budget) -> None:
        super().__init__(environment)
        self._budget = budget

    def format_field(self, value: Any, format_spec: str) -> str:
        self._budget.draw_widths(format_spec)
        self._budget.weigh(value)
        return str(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._budget.weigh(value)
        return super().convert_field(value, conversion)


class _FormatMethod:
    """`format` of a string, taken from it and not called yet."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Namespace(Namespace):
    """Without names that Python or Jinja would look for on an object."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            _check_name(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: encloses what stands between in the budget's marks."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body, lineno=line)

    @pass_context
    def _mark(self, context: Context, caller: Macro) -> str:
        start, end = context.parent[BUDGET].marks
        return f"{start}{caller()}{end}"


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers sets it up, with what is listed above and no more."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # constants are computed at run time too, on the budget
            finalize=_weigh,
        )
        self.globals = {
            "range": self.globals["range"],
            "dict": _make_dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {name: _paid_filter(name) for name in _FILTERS} | {n: FILTERS[n] for n in _LIGHT_FILTERS}
        self.filters |= {"tojson": _tojson, "weigh": _weigh, "counted": _counted, "draw": _draw, "sliced": _sliced}
        self.tests = {name: test if name in _LIGHT_TESTS else _paid_test(name) for name, test in TESTS.items()}

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # whose hash may cost anything
            raise jinja2.exceptions.SecurityError("a tuple as an index")
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        """Instead of Jinja's own: called with the budget, in `call`."""
        is_method = isinstance(value, (BuiltinMethodType, MethodType)) and isinstance(value.__self__, str)
        return _FormatMethod(value.__self__) if is_method and value.__name__ == "format" else None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _draw_operator(context.parent[BUDGET], operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        budget: Budget = __context.parent[BUDGET]
        if isinstance(__obj, _FormatMethod):
            budget.weigh(__obj.text)
            return _Formatter(__self, budget).vformat(__obj.text, args, kwargs)
        if isinstance(__obj, (Macro, LoopContext)):
            budget.draw(1 + sum(len(a) for a in args if isinstance(a, (str, list, tuple, dict))))
        elif isinstance(__obj, (BuiltinMethodType, MethodType)):
            __self._draw_method(budget, __obj, args, kwargs)
        elif not isinstance(__obj, Undefined):
            if not any(__obj is function for function in __self.globals.values()):
                raise jinja2.exceptions.SecurityError(f"a call of {type(__obj).__name__}")
            budget.weigh(args)
            budget.weigh(kwargs)
        return __context.call(__obj, *args, **kwargs)

    @staticmethod
    def _draw_method(budget: Budget, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner, name = method.__self__, method.__name__
        if isinstance(owner, _Generation):
            return
        if not any(isinstance(owner, kind) and name in allowed for kind, allowed in _METHODS.items()):
            raise jinja2.exceptions.SecurityError(f"a call of {type(owner).__name__}.{name}")
        budget.weigh(args)
        budget.weigh(kwargs)
        if isinstance(owner, str):
            _draw_string_method(budget, owner, name, args, kwargs)
        elif isinstance(owner, (list, tuple)):
            budget.weigh(owner)
        elif isinstance(owner, dict):
            budget.draw(1 + (len(owner) if name == "copy" else 0))


class _Metering(NodeTransformer):
    """Puts what has to be paid while it runs into a parsed template."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if isinstance(node, _REFUSED_NODES):
            raise TemplateError(
                f"the chat template uses {type(node).__name__.lower()} (line {node.lineno}); it must stand alone"
            )
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        steps = _steps([*node.body, *node.else_, *([node.test] if node.test else [])])
        self.generic_visit(node)
        node.iter = _filter(node.iter, "counted", steps)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._charge_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._charge_body(node)

    def _charge_body(self, node: Any) -> nodes.Node:
        steps = nodes.Const(_steps(node.body), lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(steps, "draw"), lineno=node.lineno))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Unless it is whether something equals a constant, which is over with the constant."""
        self.generic_visit(node)
        first = node.ops[0]
        if not (first.op in ("eq", "ne") and isinstance(first.expr, nodes.Const) and len(node.ops) == 1):
            node.expr = _filter(node.expr, "weigh")
            for operand in node.ops:
                operand.expr = _filter(operand.expr, "weigh")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filter(part, "weigh") for part in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "sliced")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _filter(node.key, "weigh")
        return node


def _filter(node: Any, name: str, *arguments: int) -> nodes.Filter:
    constants: list[nodes.Expr] = [nodes.Const(argument, lineno=node.lineno) for argument in arguments]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _steps(body: Sequence[nodes.Node]) -> int:
    """What one run through `body` costs at most, without the bodies in it that pay for themselves."""
    steps, rest = 1, list(body)
    while rest:
        node = rest.pop()
        steps += 1
        if isinstance(node, nodes.TemplateData):
            steps += len(node.data) // CHARACTERS_PER_STEP
        inner = ("body", "else_") if isinstance(node, nodes.For) else ("body",)
        rest += node.iter_child_nodes(inner if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)) else None)
    return steps


def _is_generation(node: nodes.Node) -> bool:
    """Whether a node stands for a `{% generation %}` block."""
    called = node.call.node if isinstance(node, nodes.CallBlock) else None
    return isinstance(called, nodes.ExtensionAttribute) and called.identifier == _Generation.identifier


def _generation_in_buffer(tree: nodes.Template) -> bool:
    """Whether the template can look at the text of a `{% generation %}` block before it is put out."""
    buffers = (nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Macro, nodes.For)
    return any(
        any(map(_is_generation, node.find_all(nodes.CallBlock)))
        for node in tree.find_all(buffers)
        if not _is_generation(node) and not (isinstance(node, nodes.For) and not node.recursive)
    )


@pass_context
def _weigh(context: Context, value: Any) -> Any:
    context.parent[BUDGET].weigh(value)
    return value


@pass_context
def _counted(context: Context, value: Any, steps: int) -> Iterator[Any]:
    counted: Iterator[Any] = context.parent[BUDGET].counted(value, steps)
    return counted


@pass_context
def _draw(context: Context, steps: int) -> None:
    context.parent[BUDGET].draw(steps)


@pass_context
def _sliced(context: Context, value: Any) -> Any:
    context.parent[BUDGET].draw(len(value) // (CHARACTERS_PER_STEP if isinstance(value, str) else 1))
    return value


def _paid_filter(name: str) -> Callable[..., Any]:
    """A filter of Jinja's that pays for its operands first, and for the items that it gives as they are asked for."""

    @pass_context
    def paid(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.parent[BUDGET]
        value = _listed(budget, value)
        budget.weigh(value)
        budget.weigh(args)
        budget.weigh(kwargs)
        _draw_filter(budget, name, value, args, kwargs)
        result = _PLAIN.call_filter(name, value, args, kwargs, context=context)
        return budget.counted(result, 1) if isinstance(result, Iterator) else result

    return paid


def _paid_test(name: str) -> Callable[..., bool]:
    @pass_context
    def paid(context: Context, *operands: Any) -> bool:
        context.parent[BUDGET].weigh(operands)
        return bool(_PLAIN.call_test(name, operands[0], operands[1:]))

    return paid


def _listed(budget: Budget, value: Any) -> Any:
    """The items of an iterator, which can be weighed."""
    return list(budget.counted(value, 1)) if isinstance(value, (Iterator, range)) else value


def _draw_filter(budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pay for what grows faster than the operands."""
    size = len(value) if isinstance(value, (str, *_CONTAINERS, Mapping)) else 1
    if name in ("list", "reverse", "unique", "wordcount"):
        budget.draw(size)
    elif name in ("dictsort", "groupby", "sort"):
        budget.draw(size * size.bit_length())
        for _ in range(size.bit_length()):
            budget.weigh(value)
    elif name == "join":
        budget.draw_characters(size * _size_of(_argument(args, kwargs, 0, "d", "")))
    elif name == "indent":
        width = _argument(args, kwargs, 0, "width", 4)
        budget.draw_characters(str(value).count("\n") * _size_of(width) + _size_of(width))
    elif name == "replace":
        old, new = (str(_argument(args, kwargs, i, key, "")) for i, key in enumerate(("old", "new")))
        budget.draw_characters(str(value).count(old) * len(new))
    elif name == "round":
        budget.draw(abs(int(_argument(args, kwargs, 0, "precision", 0))) ** 2)


def _draw_string_method(budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pay for reading the text and for what is made of it."""
    budget.weigh(text)
    if name in ("split", "rsplit", "splitlines"):
        budget.draw(len(text))
    elif name == "join" and args:
        budget.draw_characters(len(text) * len(args[0]))
    elif name in ("center", "ljust", "rjust", "zfill"):
        budget.draw_characters(_size_of(_argument(args, kwargs, 0, "width", 0)))
    elif name == "expandtabs":
        budget.draw_characters(text.count("\t") * _size_of(_argument(args, kwargs, 0, "tabsize", 8)))
    elif name == "replace" and len(args) > 1:
        budget.draw_characters(text.count(args[0]) * len(args[1]))


def _draw_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Pay for the result of `left operator right`."""
    if operator == "%" and isinstance(left, str):
        budget.weigh((left, right))
        budget.draw_widths(left)
        if "*" in left:
            budget.draw_characters(
                sum(abs(i) for i in (right if isinstance(right, tuple) else ()) if isinstance(i, int))
            )
        return
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        budget.draw_characters(left.bit_length() * abs(right))
    elif operator == "*":
        many, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(times, int) and isinstance(many, (str, list, tuple)):
            budget.draw(len(many) * max(0, times) // (CHARACTERS_PER_STEP if isinstance(many, str) else 1))
    for operand in (left, right):
        if isinstance(operand, str):
            budget.draw_characters(len(operand))
        elif isinstance(operand, int):
            budget.draw((operand.bit_length() // 64) ** 2)
        elif isinstance(operand, (list, tuple)):
            budget.draw(len(operand))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _size_of(value: Any) -> int:
    """How many characters a width or a separator stands for."""
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 1


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: nothing is escaped for HTML."""
    budget: Budget = context.parent[BUDGET]
    budget.weigh(value)
    budget.weigh(separators)
    if indent is not None or separators is not None:
        _draw_layout(budget, value, _size_of(indent), sum(map(_size_of, separators or ())))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _draw_layout(budget: Budget, value: Any, indent: int, separators: int, depth: int = 1) -> None:
    """Pay for the white space and the separators that JSON puts around each item."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for item in items:
        budget.draw_characters(depth * indent + separators)
        _draw_layout(budget, item, indent, separators, depth + 1)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


@pass_context
def _strftime_now(context: Context, format: str) -> str:
    context.parent[BUDGET].draw_widths(format)
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace with the name {name!r}")


def _without_marks(text: str, marks: tuple[str, str]) -> tuple[str, list[Span]]:
    """The text between marks, and where it stands once they are gone; marks inside others add nothing."""
    start, end = marks
    parts: list[str] = []
    spans: list[Span] = []
    depth = at = opened = 0
    for part in re.split(f"([{start}{end}])", text):
        if part == start:
            opened = opened if depth else at
            depth += 1
        elif part == end:
            depth -= 1
            if not depth and at > opened:
                spans.append((opened, at))
        else:
            parts.append(part)
            at += len(part)
    return "".join(parts), spans


def _short(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _line(error: jinja2.TemplateError) -> int | str:
    return getattr(error, "lineno", "?")


_PLAIN = ImmutableSandboxedEnvironment()  # runs Jinja's own filters and tests
