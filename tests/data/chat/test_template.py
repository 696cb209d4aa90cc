"""What of a conversation is learned: as transformers has it, and as the templates of well-known families need it."""

import json
import random
import re

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from engine.data.chat.builtin import BUILTIN
from engine.data.chat.template import ChatEncoder, ChatTemplate, ConversationError, TemplateError, find_template
from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip

CALLS = """\
{%- if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson(indent=2)) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}
        {%- if m.content %}{{ m.content | trim }}{% endif %}
        {%- for call in m.tool_calls or [] %}{{ '\\n<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
<|im_end|>{% endgeneration %}
    {%- elif m.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}
{{ '\\n<response>' + m.content + '</response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>{% endif %}
    {%- else %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

CONDITIONS = """\
{%- macro turn(m) %}{{ '<|' + m.role + '|>' }}{% endmacro %}
{{- bos_token }}
{%- set ns = namespace(seen=false) %}
{%- for m in messages %}
    {%- if m['role'] == 'system' %}
        {%- if m.content | length > 0 %}{{ m.content }}{% set ns.seen = true %}{% else %}{{ '(none)' }}{% endif %}
    {%- elif m.role in ['assistant'] %}
        {{- turn(m) }}
        {%- if loop.last %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
        {%- else %}
            {%- generation %}{{ m.content.strip() }}<|end|>{% endgeneration %}
        {%- endif %}
    {%- elif ns.seen or loop.index0 % 2 == 0 %}{{ '<|user|>' ~ m.content ~ '<|end|>' }}
    {%- else %}{{ '<|user|>' + m.content.upper() }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A byte-level tokenizer with the special tokens of several families, as transformers and we read it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        standard_library_texts(30_000),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    path = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load_tokenizer(folder)


def encoder(tokenizer, source):
    known = find_template(tokenizer, "mistral")
    return ChatEncoder(tokenizer, ChatTemplate("test", source, known.roles, known.special))


def random_conversations(count, *, tools=False):
    rng = random.Random(0)
    parts = [
        "Hello",
        " world",
        "naïve ",
        "中文",
        "👩‍👩‍👧",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "def f(x):\n    return x\n",
        "é",
        "e\u0301",
    ]
    parts += [
        "",
        "<b>",
        "{{ x }}",
        "```py\nprint(1)\n```",
        "<|im_end|>",
        "</s>",
        "\u2581",
        "🎉",
        "1234",
        "&amp;",
        "'\"",
    ]

    def text():
        return "".join(rng.choices(parts, k=rng.choice((0, 1, 3, 10, 40))))

    for _ in range(count):
        system = [{"role": "system", "content": rng.choice(("", text()))}] * rng.randint(0, 1)
        turns = []
        for _ in range(rng.randint(1, 4)):
            turns.append({"role": "user", "content": text()})
            if tools and rng.random() < 0.3:
                call = {"type": "function", "function": {"name": "look_up", "arguments": {"q": text(), "n": [1, None]}}}
                turns.append({"role": "assistant", "content": rng.choice((None, text())), "tool_calls": [call]})
                turns += [{"role": "tool", "content": text()}] * rng.randint(1, 2)
            turns.append({"role": "assistant", "content": text()})
        yield system + turns[: len(turns) - rng.choice((0, 0, 0, 1))]


TOOL = {"type": "function", "function": {"name": "look_up", "description": "é <b>", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", [*BUILTIN, "calls", "conditions"])
def test_ids_and_mask_are_those_of_transformers(folder, tokenizer, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tools = [TOOL] if name == "calls" else None
    own = {"calls": CALLS, "conditions": CONDITIONS}
    ours = encoder(tokenizer, own[name]) if name in own else ChatEncoder(tokenizer, find_template(tokenizer, name))
    learned = 0
    for messages in random_conversations(200, tools=name == "calls"):
        expected = theirs.apply_chat_template(
            messages, tools=tools, chat_template=ours.template.source, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids, mask = ours.encode(messages, tools=tools)
        assert ids.tolist() == expected["input_ids"]
        assert mask.astype(int).tolist() == expected["assistant_masks"]
        prompt = theirs.apply_chat_template(
            messages, tools=tools, chat_template=ours.template.source, add_generation_prompt=True
        )
        assert ours.prompt_ids(messages, tools) == prompt["input_ids"]
        learned += mask.sum()
    assert learned > 1000


def conversation(*contents, system=None):
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def learned(template, messages, train_on="assistant"):
    rendered = template.render(messages, train_on)
    return [rendered.text[start:end] for start, end in rendered.learned]


@pytest.mark.parametrize(
    ("name", "text", "prompt"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n"
            "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n",
            "<|im_start|>assistant\n",
        ),
        (
            "llama2",
            "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nu [/INST][ a </s>]<s>[INST] v [/INST][ b </s>]",
            "",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "u<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[a<|eot_id|>]"
            "<|start_header_id|>user<|end_header_id|>\n\nv<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            "[b<|eot_id|>]",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] S\n\nu [/INST][ a</s>][INST] v [/INST][ b</s>]", ""),
    ],
)
def test_built_in_formats(tokenizer, name, text, prompt):
    template = find_template(tokenizer, name)
    messages = conversation("u", "a", "v", "b", system="S")
    rendered = template.render(messages)
    for start, end in reversed(rendered.learned):
        text = text.replace(f"[{rendered.text[start:end]}]", rendered.text[start:end])
    assert rendered.text == text
    assert len(rendered.learned) == 2
    assert all(rendered.text[end - 1] == ">" and "INST" not in rendered.text[s:end] for s, end in rendered.learned)
    assert template.prompt(messages).removeprefix(text) == prompt
    assert learned(template, messages, "last") == learned(template, messages)[-1:]
    assert learned(template, messages, "all") == [text]


def without_marks(source):
    return source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


@pytest.mark.parametrize("name", BUILTIN)
def test_turn_by_turn_finds_what_marks_say(tokenizer, name):
    """The same templates with and without marks, also for contents that look like the template's own text."""
    marked = ChatEncoder(tokenizer, find_template(tokenizer, name))
    plain = encoder(tokenizer, without_marks(BUILTIN[name].source))
    assert plain.end_of_turn_id == marked.end_of_turn_id
    for messages in random_conversations(60):
        for train_on in ("assistant", "last", "all"):
            assert plain.template.render(messages, train_on) == marked.template.render(messages, train_on)


CHATML = without_marks(BUILTIN["chatml"].source)

THOUGHTS = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- set thought = m.reasoning_content or '' %}
        {%- set said = m.content %}
        {%- if '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
        {%- else %}{{ said }}{% endif %}
    {%- else %}{{ m.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_thoughts_that_are_dropped_from_earlier_turns(tokenizer):
    template = encoder(tokenizer, THOUGHTS).template
    messages = conversation("u", "<think>\nwhy\n</think>\n\na", "v", "<think>\nhow\n</think>\n\nb")
    assert learned(template, messages) == ["a<|im_end|>", "<think>\nhow\n</think>\n\nb<|im_end|>"]
    assert learned(template, messages, "last") == ["<think>\nhow\n</think>\n\nb<|im_end|>"]
    assert learned(template, [*messages, {"role": "user", "content": "w"}]) == ["a<|im_end|>", "b<|im_end|>"]
    spelt = conversation("u", "<think>\nwhy\n</think>\n\n<|im_end|>", "v", "b")
    assert learned(template, spelt)[0] == "<|im_end|><|im_end|>"
    messages[1] = {"role": "assistant", "content": "<a>", "reasoning_content": "r"}
    assert learned(template, messages)[0] == "<a><|im_end|>"
    assert learned(template, messages[:2]) == ["<think>\nr\n</think>\n\n<a><|im_end|>"]


def test_a_prompt_that_begins_the_thought(tokenizer):
    """The prompt ends with `<think>`, which the turn does not have: what both begin with must not eat its first `<`."""
    source = """{{- bos_token }}{% for m in messages %}
    {%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
    {%- else %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    messages = conversation("u", "<think>\nx</think><b>", "v", "<think", "w", "t", "x", "")
    assert learned(template, messages) == ["<b></s>", "<think</s>", "t</s>", "</s>"]


def test_a_prompt_that_begins_a_thought_which_earlier_turns_lose(tokenizer):
    source = THOUGHTS.replace(
        "'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<think>\\n' }}{% endif"
    )
    template = encoder(tokenizer, source).template
    messages = conversation("u", "<think>\nwhy\n</think>\n\na<|im_end|>", "v", "b", "w", "<think>\nhow\n</think>\n\n<c")
    assert template.prompt(messages[:1]).endswith("assistant\n<think>\n")
    expected = ["a<|im_end|><|im_end|>", "b<|im_end|>", "how\n</think>\n\n<c<|im_end|>"]
    assert learned(template, messages) == expected
    assert learned(template, messages, "last") == expected[-1:]


def test_thoughts_that_are_written_otherwise_later_on(tokenizer):
    kept = "{{ '<think>' + thought + '</think>' + said }}{% endif %}"
    source = THOUGHTS.replace("{{ said }}{% endif %}", kept)
    source = source.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<think>\\n' }}{% endif")
    messages = conversation("u", "a", "v", "b")
    messages[1]["reasoning_content"] = "r"
    assert learned(encoder(tokenizer, source).template, messages)[0] == "r</think>a<|im_end|>"


def test_a_system_message_that_moves_to_the_last_question(tokenizer):
    source = """{{- bos_token }}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- if loop.index0 >= turns | length - 2 and messages[0].role == 'system' %}
            {{- '[INST] ' + messages[0].content + '\\n\\n' + m.content + '[/INST]' }}
        {%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}
    {%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
    template = encoder(tokenizer, source).template
    messages = conversation("u", " a", "v", "[INST] b", "w", "a", system="S")
    assert template.render(messages).text.startswith("<s>[INST] u[/INST] a</s>[INST] v[/INST]")
    assert learned(template, messages) == [" a</s>", " [INST] b</s>", " a</s>"]
    assert learned(template, messages, "last") == [" a</s>"]


def test_an_end_of_text_behind_the_last_turn(tokenizer):
    source = """{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
    chat = encoder(tokenizer, source)
    assert chat.end_of_turn_id == tokenizer.special_tokens["<|end|>"]
    assert learned(chat.template, conversation("u", "a", "v", "b<|end|>")) == ["a<|end|>", "b<|end|><|end|>"]


def test_earlier_turns_that_are_trimmed(tokenizer):
    source = """{%- for m in messages %}{{ '<|' + m.role + '|>' }}
    {{- m.content if loop.last else m.content | trim }}{{ '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    assert learned(template, conversation("u", " a ", "v", " b ")) == ["a<|end|>", " b <|end|>"]


def test_earlier_turns_that_become_others_are_an_error(tokenizer):
    said = "message['content'] + '<|im_end|>'"
    changed = "(message['content'] if loop.last or message['role'] in roles else 'so') + '<|im_end|>'"
    source = "{% set roles = ['user'] %}" + CHATML.replace(said, changed)
    template = encoder(tokenizer, source).template
    assert learned(template, conversation("u", "a")) == ["a<|im_end|>"]
    with pytest.raises(ConversationError, match=r"message 1: .*otherwise later on"):
        template.render(conversation("u", "a", "v", "b"))
    template = encoder(tokenizer, source.replace("['user']", "['assistant']")).template
    with pytest.raises(ConversationError, match=r"message 1: .*where the assistant's turn begins"):
        template.render(conversation("u", "a"))


def test_earlier_turns_that_are_left_out_are_an_error(tokenizer):
    """The user says the same then, under the same header."""
    source = """{%- for m in messages %}{% if m.role == 'user' or loop.last %}
    {{- '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    assert learned(template, conversation("u", "a")) == ["a<|im_end|>"]
    with pytest.raises(ConversationError, match=r"message 1: .*leaves this turn of the assistant out"):
        template.render(conversation("u", "same", "same", "b"))


def test_more_turns_than_can_be_searched_for(tokenizer):
    many = conversation(*["hi"] * 320)
    assert len(learned(encoder(tokenizer, BUILTIN["chatml"].source).template, many)) == 160
    template = encoder(tokenizer, CHATML).template
    for messages in (many, conversation(*["hi" * 100_000] * 40)):
        with pytest.raises(ConversationError, match=r"turns .* too many to find without {% generation %} marks"):
            template.render(messages)
    assert len(learned(template, many, "last")) == 1


@pytest.mark.parametrize("sides", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
def test_special_tokens_that_swallow_white_space(folder, tmp_path, sides):
    """Headers are not learned because they take the white space that the answer begins with, or that follows it."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [{**token, **sides} for token in content["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    source = """{%- for m in messages %}{{ '<|' + m.role + '|>' }}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>\\n' }}{% endgeneration %}
    {%- else %}{{ m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"""
    ids, mask = encoder(tokenizer, source).encode(conversation(" u ", "\n a ", " v ", "b"))
    said = tokenizer.decode(ids[mask].tolist())
    assert "user" not in said and "assistant" not in said
    assert ["".join(part.split()) for part in said.split("<|end|>")] == ["a", "b", ""]


def test_the_mask_is_that_of_each_span(tokenizer):
    chat = ChatEncoder(tokenizer, find_template(tokenizer, "chatml"))
    for messages in random_conversations(30):
        rendered = chat.template.render(messages)
        _, spans = tokenizer.encode_special(rendered.text)
        expected = [any(s < end and e > start and s < e for start, end in rendered.learned) for s, e in spans]
        assert chat.encode(messages)[1].tolist() == expected


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("uaa", "aa"),
        ("a", "a"),
        ("au", "a"),
        ("saua", "aa"),
        ("uatau", "aa"),
        ("uu", ""),
        ("s", ""),
        ("uaaaua", "aaaa"),
    ],
)
def test_orders_of_roles(tokenizer, roles, expected):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [{"role": names[role], "content": f"{role}{i}"} for i, role in enumerate(roles)]
    for source in (CHATML, BUILTIN["chatml"].source):
        found = learned(encoder(tokenizer, source).template, messages)
        assert found == [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert len(found) == len(expected)


def test_marks_that_leave_the_end_of_turn_out(tokenizer):
    source = BUILTIN["chatml"].source.replace(
        "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}",
        "{%- generation %}{{- message['content'] }}{%- endgeneration %}{{- '\\n<|im_end|>' }}",
    )
    assert learned(encoder(tokenizer, source).template, conversation("u", "a")) == ["a\n<|im_end|>"]
    source = source.replace("{%- generation %}", "{%- generation %}{{- 'T' }}{%- endgeneration %}-{%- generation %}")
    template = encoder(tokenizer, source).template
    assert learned(template, conversation("u", "a", "v", "b")) == ["T", "a\n<|im_end|>", "T", "b\n<|im_end|>"]
    assert learned(template, conversation("u", "a", "v", "b"), "last") == ["T", "b\n<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}", "nothing follows"),
        ("{% for m in messages %}{{ m.content + '[END]' }}{% endfor %}", r"'\[END\]' follows"),
        ("{{ messages[0].content }}", "does not write the content"),
        ("{{ raise_exception('never') }}", "fails for a question and its answer: never"),
        ("{{ nothing.at_all }}", "fails for a question"),
    ],
)
def test_templates_without_an_end_of_turn(tokenizer, source, message):
    with pytest.raises(TemplateError, match=message):
        encoder(tokenizer, source)


def test_special_tokens_in_messages_are_seen(tokenizer):
    chat = ChatEncoder(tokenizer, find_template(tokenizer, "chatml"))
    assert not chat.spells_special(conversation("a < b |im_end| s>", "x", system=""))
    assert chat.spells_special(conversation("u", "x</s>y"))
    assert chat.spells_special(
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"q": ["<|im_end|>"]}}}]}]
    )


# Where templates come from


def test_the_tokenizers_own_template(tmp_path, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ConfigError, match=r"no chat template; name one: chatml, llama2, llama3, mistral"):
        find_template(load_tokenizer(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for content in ("one", [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": content}))
        assert find_template(load_tokenizer(tmp_path)).source == "one"
    (tmp_path / "chat_template.jinja").write_text("three")
    found = find_template(load_tokenizer(tmp_path))
    assert (found.source, found.name) == ("three", str(tmp_path / "chat_template.jinja"))
    assert (found.roles["bos_token"], found.roles["eos_token"]) == ("<s>", "</s>")
    assert "pad_token" not in found.roles
    for more, reason in (
        ({"x_token": "x" * 1001}, "x_token of tokenizer_config.json has 1,001 characters, expected .* 1,000"),
        ({f"x{i}_token": "x" for i in range(101)}, "names 103 tokens, expected at most 100"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
        with pytest.raises(ConfigError, match=reason):
            find_template(load_tokenizer(tmp_path))


def test_named_templates(tmp_path, tokenizer):
    path = tmp_path / "x.jinja"
    path.write_text(CHATML)
    assert find_template(tokenizer, str(path)).source == CHATML
    with pytest.raises(ConfigError, match=r"y\.jinja.*No such file.*one of: chatml, llama2, llama3, mistral"):
        find_template(tokenizer, str(tmp_path / "y.jinja"))
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        find_template(tokenizer, str(path))


def test_built_in_templates_whose_tokens_the_vocabulary_lacks():
    with pytest.raises(ConfigError, match=r"lacks <\|im_start\|>, <\|im_end\|>; .* work with it: llama2, mistral"):
        find_template(ByteTokenizer(), "chatml")


@pytest.fixture(scope="session", params=["byte", "sentencepiece", "without_begin"])
def plain_tokenizer(request, tmp_path_factory):
    if request.param == "byte":
        return ByteTokenizer()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    options = {"bos_id": -1} if request.param == "without_begin" else {}
    path.write_bytes(train_sentencepiece(standard_library_texts(30_000), vocab_size=400, **options))
    return load_tokenizer(path)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_tokenizers_without_tokens_for_chat(plain_tokenizer, name):
    chat = ChatEncoder(plain_tokenizer, find_template(plain_tokenizer, name))
    assert chat.end_of_turn_id == plain_tokenizer.eod_id
    messages = conversation("u", "naïve 中", "v", "</s>", system="é")
    ids, mask = chat.encode(messages)
    text = chat.template.render(messages).text
    assert (plain_tokenizer.bos_id in ids.tolist()) == (plain_tokenizer.bos_id is not None)
    assert ids[mask].tolist().count(plain_tokenizer.eod_id) >= 2
    assert ids.tolist() == plain_tokenizer.encode_special(text)[0]
    said = plain_tokenizer.decode(ids[mask].tolist())
    assert "naïve 中" in said and "INST" not in said
    assert chat.prompt_ids(messages[:2]) == ids[: len(chat.prompt_ids(messages[:2]))].tolist()


def test_types_of_the_arrays(tokenizer):
    ids, mask = ChatEncoder(tokenizer, find_template(tokenizer, "chatml")).encode(conversation("u", "a"))
    assert (ids.dtype, mask.dtype, ids.shape) == ("int32", "bool", mask.shape)


@pytest.mark.parametrize("name", ["chatml", "unmarked"])
def test_turns_of_weight_0_are_not_learned(tokenizer, name):
    source = BUILTIN["chatml"].source
    if name == "unmarked":
        source = re.sub(r"{%-? *(end)?generation *-?%}", "", source)
    template = ChatTemplate(name, source, {}, tuple(tokenizer.special_tokens))
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    messages = [{"role": role, "content": content} for role, content in turns]

    def learned(messages, train_on="assistant"):
        rendered = template.render(messages, train_on)
        return [rendered.text[start:end] for start, end in rendered.learned]

    end = template.end_of_turn
    assert [text.strip() for text in learned(messages)] == ["first" + end, "second" + end]
    messages[1]["weight"] = 0
    assert [text.strip() for text in learned(messages)] == ["second" + end]
    messages[3]["weight"] = 0
    assert learned(messages, "last") == []
    messages[1]["weight"] = 1
    assert [text.strip() for text in learned(messages)] == ["first" + end]


def test_hostile_named_and_huge_templates(tmp_path, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    configuration = {"eos_token": "<|im_end|>", "chat_template": [{"name": ["default"], "template": 3}, 5, {}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration))
    with pytest.raises(ConfigError, match="comes with no chat template"):
        find_template(load_tokenizer(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("x" * (1 << 20))
    with pytest.raises(TemplateError, match="more than 65,536"):
        find_template(load_tokenizer(tmp_path))
