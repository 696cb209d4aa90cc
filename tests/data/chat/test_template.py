"""The text of a conversation and its targets: built-in formats, roles, generation blocks, ends of turn, weights."""

import re

import pytest

from engine.data.chat.builtin import BUILTIN
from engine.data.chat.errors import ConversationError, TemplateError
from engine.data.chat.find import find_template
from engine.data.chat.template import ChatTemplate
from tests.data.chat.examples import CHATML, conversation, encoder, targets


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
    for start, end in reversed(rendered.targets):
        text = text.replace(f"[{rendered.text[start:end]}]", rendered.text[start:end])
    assert rendered.text == text
    assert len(rendered.targets) == 2
    assert all(rendered.text[end - 1] == ">" and "INST" not in rendered.text[s:end] for s, end in rendered.targets)
    assert template.prompt(messages).removeprefix(text) == prompt
    assert targets(template, messages, "last") == targets(template, messages)[-1:]
    assert targets(template, messages, "all") == [text]


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
        found = targets(encoder(tokenizer, source).template, messages)
        assert found == [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert len(found) == len(expected)


def test_marks_that_leave_the_end_of_turn_out(tokenizer):
    source = BUILTIN["chatml"].source.replace(
        "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}",
        "{%- generation %}{{- message['content'] }}{%- endgeneration %}{{- '\\n<|im_end|>' }}",
    )
    assert targets(encoder(tokenizer, source).template, conversation("u", "a")) == ["a\n<|im_end|>"]
    source = source.replace("{%- generation %}", "{%- generation %}{{- 'T' }}{%- endgeneration %}-{%- generation %}")
    template = encoder(tokenizer, source).template
    assert targets(template, conversation("u", "a", "v", "b")) == ["T", "a\n<|im_end|>", "T", "b\n<|im_end|>"]
    assert targets(template, conversation("u", "a", "v", "b"), "last") == ["T", "b\n<|im_end|>"]


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


@pytest.mark.parametrize("name", ["chatml", "unmarked"])
def test_turns_of_weight_0_are_no_targets(tokenizer, name):
    source = BUILTIN["chatml"].source
    if name == "unmarked":
        source = re.sub(r"{%-? *(end)?generation *-?%}", "", source)
    template = ChatTemplate(name, source, {}, tuple(tokenizer.special_tokens))
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    messages = [{"role": role, "content": content} for role, content in turns]

    def targets(messages, train_on="assistant"):
        rendered = template.render(messages, train_on)
        return [rendered.text[start:end] for start, end in rendered.targets]

    end = template.end_of_turn
    assert [text.strip() for text in targets(messages)] == ["first" + end, "second" + end]
    messages[1]["weight"] = 0
    assert [text.strip() for text in targets(messages)] == ["second" + end]
    messages[3]["weight"] = 0
    assert targets(messages, "last") == []
    messages[1]["weight"] = 1
    assert [text.strip() for text in targets(messages)] == ["first" + end]


@pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_under_any_name_are_written(tokenizer, folder, key, read):
    transformers = pytest.importorskip("transformers", minversion="5")
    source = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
    {%- if m.KEY %}{{ '<think>' + m.KEY + '</think>' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}""".replace(
        "KEY", read
    )
    messages = conversation("far?", "nine miles")
    messages[1][key] = "counted the stones"
    text = encoder(tokenizer, source).template.render(messages, "all").text
    assert text.endswith("<think>counted the stones</think>nine miles<|im_end|>")
    if read == "reasoning" != key:  # transformers gives thoughts this name only if they have it
        messages[1]["reasoning"] = messages[1][key]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert text == theirs.apply_chat_template(messages, chat_template=source, tokenize=False)


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_an_empty_name_does_not_hide_thoughts(tokenizer, key, read, empty):
    source = "{% for m in messages %}{{ m.role + (m.KEY or '') + m.content + '<|im_end|>' }}{% endfor %}"
    messages = conversation("u", "a")
    messages[1] |= {"reasoning_content": empty, "thinking": empty, "reasoning": empty, key: "counted"}
    text = encoder(tokenizer, source.replace("KEY", read)).template.render(messages, "all").text
    assert text.endswith("assistantcounteda<|im_end|>")


def test_a_template_that_needs_tools(tokenizer):
    """Its end of turn is found, and it renders conversations with tools."""
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    source = """{% for tool in tools %}{{ tool.function.name }}{% endfor %}
    {%- for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    rendered = template.render(conversation("u", "a"), tools=tools)
    assert [rendered.text[start:end] for start, end in rendered.targets] == ["a<|im_end|>"]
    with pytest.raises(ConversationError, match="not iterable"):
        template.render(conversation("u", "a"))
