"""Chat templates cannot escape, cannot run away, and render as they do in transformers."""

import json
import threading

import pytest

from engine.data.chat.compiled import SOURCE_LIMIT, CompiledTemplate
from engine.data.chat.errors import ConversationError, TemplateError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def text_of(source, messages=MESSAGES, **variables):
    return CompiledTemplate(source).render(messages, **variables)[0]


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ messages|attr('__class__') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ messages|sort(attribute='__class__') }}",
    "{{ messages|selectattr('__class__')|list }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ self._TemplateReference__context }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% for m in messages %}{{ loop._iterable }}{% endfor %}",
    "{{ (messages|map('upper')).gi_frame }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__class__}'|safe).format('') }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{% set f = ''.format %}{{ f.__init__ }}",
    "{{ ['{0.__class__}'.format]|map('string')|list }}{{ ('{0.__class__}'.format)('') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import system %}",
    "{% extends '/etc/passwd' %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% autoescape true %}{{ messages }}{% endautoescape %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].clear() }}",
    "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ namespace({'__call__': 1}) }}",
    "{{ 'a'.encode() }}",
    "{{ (1).to_bytes(9, 'big') }}",
    "{{ 'a'.translate({97: 'b'}) }}",
    "{{ 'x'() }}",
    "{{ messages() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_are_refused(source):
    with pytest.raises(TemplateError, match=r"forbidden operation|expected a self-contained template|No filter named"):
        text_of(source)
    assert MESSAGES == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize("name", ["lipsum", "cycler", "joiner", "open", "os", "__builtins__", "self", "environment"])
def test_what_else_a_template_could_know_is_undefined(name):
    if name == "self":  # knows the template's blocks, of which there are none
        assert text_of("{{ self.a is defined }}") == "False"
    else:
        assert text_of(f"{{{{ {name} is defined }}}}") == "False"


GROW = "{% set ns = namespace(s=['ab'], t=('ab',)) %}{% for i in range(100) %}"
DOUBLED = GROW + "{% set ns.s = [ns.s, ns.s] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
RECURSE = "{% for i in [0] recursive %}{% if i == 0 %}"
LONG = "{% set s = 'a' * 1000000 %}{% for i in range(100000) %}"
RUNAWAYS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{{ loop.length }}{% break %}{% endfor %}{% endfor %}",
    "{% for i in range(10 ** 12) %}{% endfor %}",
    "{% for i in range(100000) %}{{ range(100000)|list|length }}{% endfor %}",
    "{{ ([range(100000)|list] * 1000)|map('list')|map('join')|list|length }}",
    "{{ ([messages] * 100000)|map('tojson')|join|length }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    GROW + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    GROW + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    GROW + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s|tojson }}",
    GROW + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s|upper }}",
    GROW + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ '%s' % (ns.s,) }}",
    GROW + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ '{!r}'.format(ns.s) }}",
    GROW + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s in [ns.s, ns.t] }}",
    GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1} }}",
    GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ messages[0][ns.t] }}",
    GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ messages[0].get(ns.t) }}",
    GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ [ns.t, ns.t]|unique|list }}",
    "{% set ns = namespace(s=[]) %}{% for i in range(50000) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * 'a' }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ ('a'|safe) * 10 ** 9 }}",
    "{% if 'a' * 10 ** 9 %}{% endif %}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 2 ** 2 ** 40 }}",
    "{{ range(0, 2305843009213693951 * 9, 2305843009213693951)|unique|list }}",
    "{{ ('9' * 4000)|int }}",
    "{{ 1e300|int }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' % 1 }}",
    "{{ '%(a)999999999s' % {'a': 1} }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ ('{:>999999999}'|safe).format(1) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a'.rjust(10 ** 9) }}",
    "{{ 'a'.center(10 ** 9) }}",
    "{{ 'a'.zfill(10 ** 9) }}",
    "{{ '\\t'.expandtabs(10 ** 9) }}",
    "{{ 'a'|center(10 ** 9) }}",
    "{{ 'a\\nb'|indent(10 ** 9) }}",
    "{{ ('\\x0b' * 1000)|indent(10 ** 6) }}",
    "{{ [1]|tojson(indent=10 ** 9) }}",
    "{{ (range(1000)|list)|tojson(separators=('x' * 1000000, '')) }}",
    "{{ ('a' * 10000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 10000)|replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).join(range(1000)|map('string')) }}",
    "{{ range(10000)|join('a' * 1000000) }}",
    "{{ (('a' * 1000000,) * 10000)|join }}",
    "{{ ''.join(['a' * 1000000] * 10000) }}",
    "{{ [1]|batch(10 ** 9, 'x')|list }}",
    "{{ ([[1] * 1000] * 10000)|sum(start=[]) }}",
    "{{ 1.5|round(10 ** 6) }}",
    "{{ ('a ' * 10000000).split() }}",
    "{{ ('é' * 10000000)|list }}",
    "{{ (range(100000)|list * 10)|sort }}",
    "{{ ('a' * 1000000).rfind('ab' + 'a' * 500000) }}",
    "{{ ('a' * 1000000).strip('b' * 500000 + 'a') }}",
    "{{ ('a' * 1000000)|trim('b' * 500000 + 'a') }}",
    "{{ strftime_now('%999999999d') }}",
    "{{ strftime_now('%c' * 10000000) }}",
    LONG + "{% if 'b' in s %}{% endif %}{% endfor %}",
    LONG + "{% if s == s ~ '' %}{% endif %}{% endfor %}",
    LONG + "{% if s is upper %}{% endif %}{% endfor %}",
    LONG + "{% set x = s[1:] %}{% endfor %}",
    LONG + "{% set x = s.upper() %}{% endfor %}",
    LONG + "{% set x = s|upper %}{% endfor %}",
    "{% for i in range(100000) %}{% if 'a' in range(100000) %}{% endif %}{% endfor %}",
    "{% set x %}{% for i in range(100000) %}" + "x" * 50_000 + "{% endfor %}{% endset %}",
    "{% macro m() %}" + "x" * 50_000 + "{% endmacro %}"
    "{% set x %}{% for i in range(99999) %}{{ m() }}{% endfor %}{% endset %}",
    "{% macro m() %}" + "{{ a }}" * 9_000 + "{% endmacro %}{% for i in range(99999) %}{% set x = m() %}{% endfor %}",
    DOUBLED + "{{ ns.t is filter }}",
    DOUBLED + "{{ ns.t is test }}",
    DOUBLED + "{{ messages[0][ns.s].x }}",
    DOUBLED + "{{ messages[0][{'a': ns.s}].x }}",
    DOUBLED + "{{ messages[0][ns.t:1] }}",
    DOUBLED + "{{ {'a': ns.s}.items().mapping }}",
    DOUBLED + "{{ [ns]|unique(attribute='t')|list }}",
    DOUBLED + "{{ [ns]|join(attribute='s') }}",
    "{% macro m(a=[" + "0," * 3_000 + "]) %}{% endmacro %}{% for i in range(60000) %}{% set x = m() %}{% endfor %}",
    "{% macro m() %}{% for i in range(60000) %}{% set x = caller() %}{% endfor %}{% endmacro %}"
    "{% call(a=[" + "0," * 3_000 + "]) m() %}{% endcall %}",
    RECURSE + "{{ loop(range(1, 999999)) }}{% endif %}{% set x = [" + "0," * 3_000 + "] %}{% endfor %}",
    RECURSE + "{{ loop(range(1, 999999)) }}{{ loop(range(1, 999999)) }}{% endif %}{% endfor %}",
    RECURSE + "{% set l = loop %}{% for j in range(60000) %}{% set x = l([]) %}{% endfor %}{% endif %}"
    "{% else %}{% set x = [" + "0," * 3_000 + "] %}{% endfor %}",
    "{% for i in range(60000) %}{% for j in [] %}{% else %}"
    "{% set x = [" + "0," * 3_000 + "] %}{% endfor %}{% endfor %}",
    "{{ (['x'] * 10000)|map(attribute='0.' * 2000000 ~ '0')|list }}",
    "{{ (['x'] * 10000)|selectattr('0.' * 100000 ~ '0')|list }}",
    "{{ (['x'] * 10000)|sort(attribute='0,' * 100000 ~ '0') }}",
    "{{ (['x'] * 10000)|join(',', '0.' * 100000 ~ '0') }}",
    "{% set s = 'a' * 7000000 %}{% for i in range(99999) %}{% set x = messages[0][s] %}{% endfor %}",
    "{{ (messages * 10000)|map(attribute='a' * 1000000)|list }}",
    "{% set x = ('%(a)s' * 100) % {'a': 'x' * 1000000} %}",
    "{{ ('%(a)s' * 100) | format(a='x' * 1000000) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '%*d' | format(999999999, 1) }}",
    "{% set x = ('{0}' * 300000).format(1) %}",
    "{% set x = ('{0' ~ '[0]' * 300000 ~ '}').format('x') %}",
    "{% set x = range(100)|join(['a' * 1000000]) %}",
    "{{ ['a' * 2000000]|trim('b' * 2000000 ~ \"a[]'\") }}",
    "{{ ['a ' * 1000000]|wordcount }}",
    "{{ ('a' * 500000).rsplit(sep='ab' ~ 'a' * 250000) }}",
    "{% set ns = namespace(s='a' * 1000000) %}{% set x = ([ns] * 100)|join(attribute='s') %}",
    "{% set s = 'a' * 1000000 %}{% for i in [s, 1] %}{% if i == 1 %}"
    "{% set x = ([loop] * 100)|join(attribute='previtem') %}{% endif %}{% endfor %}",
    "{{ [(1, 2)]|unique|list }}",
    "{{ [{'a': (1, 2)}]|unique(attribute='a')|list }}",
    "{{ {(1, 2): 1} }}",
    "{{ dict([[(1, 2), 1]]) }}",
    "{{ namespace([[(1, 2), 1]]) }}",
    "{% for i in range(9999) %}{{ (0 - 10 ** 9)|draw }}{% for k in range(9999) %}{% endfor %}{% endfor %}",
    "{% for i in range(9999) %}{{ ['x']|map('counted', -10 ** 9)|list }}"
    "{% for k in range(9999) %}{% endfor %}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", RUNAWAYS)
def test_what_runs_away_is_refused(source):
    with pytest.raises(
        TemplateError,
        match=r"loops forever or grows|recurses or grows|No (filter|test) named|a number|forbidden operation|numbers|"
        r"loop itself",
    ):
        text_of(source)


def test_only_the_conversation_adds_to_the_budget():
    source = "{% for i in range(999999) %}{% set x = i %}{% endfor %}"
    long = {"function": {"description": "x" * 500_000}}
    with pytest.raises(TemplateError, match="loops forever"):
        text_of(source, x_token="x" * 500_000)
    assert text_of(source, tools=[long]) == ""


def test_limits_hold_in_threads():
    found = []

    def render():
        with pytest.raises(TemplateError):
            text_of(RUNAWAYS[0])
        found.append(True)

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True, True]


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ x",
        "{% unknown %}",
        "{% generation %}",
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
        "{{ a" + ".b" * 30_000 + " }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "x" * (SOURCE_LIMIT + 1),
        "half of a pair: \ud83d",
    ],
    ids=range(10),
)
def test_what_is_no_template(source):
    with pytest.raises(TemplateError, match="chat template"):
        CompiledTemplate(source)


def test_long_conversations_are_no_runaways():
    """The budget grows with the conversation, also for what templates in use do with the whole of it at each turn."""
    source = """{%- set ns = namespace(last=-1, roles=[]) %}
    {%- for m in messages %}
        {%- set ns.roles = ns.roles + [m.role] %}
        {%- if (messages | length) - 1 == loop.index0 or m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
        {%- for later in messages[loop.index:loop.index + 2] %}{{ later.role }}{% endfor %}
        {{- m.role + ': ' + m.content.strip().split('</think>')[-1].lstrip('\\n') | trim + '\\n' }}
    {%- endfor %}"""
    messages = [{"role": "user" if i % 2 else "assistant", "content": "word " * 40} for i in range(2000)]
    assert len(text_of(source, messages)) > 400_000
    assert len(text_of(source, [{"role": "user", "content": "word " * 2_000_000}])) == 2_000_000 * 5 + 6


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'b': '<é>', 'a': [1, None]} | tojson }}", json.dumps({"b": "<é>", "a": [1, None]}, ensure_ascii=False)),
        ("{{ {'a': [1]} | tojson(indent=2) }}", json.dumps({"a": [1]}, indent=2)),
        ("{{ {'b': 1, 'a': '</s>'} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":"</s>","b":1}'),
        ("{%- for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "assistant"),
        ("{% for m in messages %}{% break %}x{% endfor %}", ""),
        ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ '%s and %05.1f' % ('a', 2.25) }}", "a and 002.2"),
        ("{{ '%s and %05.1f' | format('a', 2.25) }} {{ '%(n)s' | format(n=1) }}", "a and 002.2 1"),
        ("{{ '{} {n:>3}'.format('a', n=1) }}", "a   1"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ (messages | rejectattr('role', 'in', ['user']) | first).content }}", "yo"),
        ("{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}", "role=user;content=hi;"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=hi;"),
        ("{{ messages[::-1][0].role }} {{ 'abc'[1:] }}", "assistant bc"),
        ("{{ dict(a=1) | tojson }} {{ messages[0].get('x', 'd') }}", '{"a": 1} d'),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}", "12"),
        ("{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}x{% endcall %}", "<x>"),
        ("{% for i in [1, [2]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}", "12"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.cycle('a', 'b') }}{% endfor %}", "1/2a2/2b"),
        ("{% filter upper %}x{% endfilter %}{% set y %}z{% endset %}{{ y }}", "Xz"),
        ("{{ tools is none }} {{ documents is defined }} {{ bos_token }}|", "True False |"),
        ("{{ messages[0].absent }}|{{ messages[0].absent is defined }}", "|False"),
        ("{{ 'a' ~ 1 ~ none }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ -3 | abs }}", "a1None 3 3 8 3"),
        ("{{ 'x' if 1 < 2 <= 2 else 'y' }} {{ 'b' in 'abc' and 'z' not in ['y'] }}", "x True"),
    ],
)
def test_rendering(source, expected):
    assert text_of(source, tools=None) == expected


def test_the_date():
    assert len(text_of("{{ strftime_now('%Y-%m-%d') }}")) == 10


def test_marked_text_is_found_wherever_it_comes_out():
    source = """
    {%- for m in messages %}
        {%- set x %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endset %}
        {{- x if m.role == 'assistant' else m.content }}
    {%- endfor %}"""
    messages = [{"role": r, "content": c} for r, c in (("user", "\ufdd0"), ("assistant", "é\ufdd1"), ("user", "b"))]
    text, spans = CompiledTemplate(source).render(messages)
    assert text == "\ufdd0[é\ufdd1]b"
    assert [text[start:end] for start, end in spans] == ["é\ufdd1"]


def test_marks_in_marks_add_nothing():
    source = (
        "a{% generation %}b{% generation %}c{% endgeneration %}d{% endgeneration %}{% generation %}{% endgeneration %}"
    )
    assert CompiledTemplate(source).render(MESSAGES) == ("abcd", [(1, 4)])


def test_a_template_that_measures_marked_text_is_refused():
    source = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(TemplateError, match="computes with the text"):
        text_of(source)


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        ("{{ raise_exception('Only user first') }}", MESSAGES, "^Only user first$"),
        ("{{ messages[0].content + messages[0].absent }}", MESSAGES, "reads an undefined variable.*absent"),
        ("{{ messages[0]['content'] + 'x' }}", [{"role": "user", "content": 3}], "TypeError"),
        ("{{ 1 / 0 }}", MESSAGES, "ZeroDivisionError"),
        ("x", [], "at least one message"),
        ("x", ["hi"], "a list of at least one message"),
        ("x", [{"role": "user", "content": object()}], "a object in a message"),
        ("{{ messages[0].content + 'x' }}", [{"role": "user", "content": None}], "reads an undefined variable"),
    ],
)
def test_conversations_that_do_not_fit(source, messages, reason):
    with pytest.raises(ConversationError, match=reason):
        text_of(source, messages)


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ '\\ud83d' }}"])
def test_half_of_a_surrogate_pair_is_no_text(source):
    messages = [{"role": "user", "content": "\ud83d"}]
    with pytest.raises(ConversationError, match=r"unpaired surrogate U\+D83D"):
        text_of(source, messages)


def test_errors_do_nothing_to_a_terminal():
    with pytest.raises(ConversationError, match=r"^\\x1b\]0;name\\x07 \\u202e\\nü$"):
        text_of("{{ raise_exception('\x1b]0;name\x07 \u202e\nü') }}")


def test_a_message_that_is_nested_too_deep():
    nested = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(ConversationError, match="nested too deeply"):
        text_of("x", [{"role": "user", "content": nested}])
