"""Assistant turns in the text of a conversation, for templates that rewrite earlier turns."""

import pytest

from engine.data.chat.builtin import BUILTIN
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.errors import ConversationError
from engine.data.chat.find import find_template
from tests.data.chat.examples import CHATML, conversation, encoder, random_conversations, targets, without_marks


@pytest.mark.parametrize("name", BUILTIN)
def test_turn_by_turn_finds_what_marks_say(tokenizer, name):
    """The same templates with and without marks, also for contents that look like the template's own text."""
    marked = ChatEncoder(tokenizer, find_template(tokenizer, name))
    plain = encoder(tokenizer, without_marks(BUILTIN[name].source))
    assert plain.end_of_turn_id == marked.end_of_turn_id
    for messages in random_conversations(60):
        for train_on in ("assistant", "last", "all"):
            assert plain.template.render(messages, train_on) == marked.template.render(messages, train_on)


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
    assert targets(template, messages) == ["a<|im_end|>", "<think>\nhow\n</think>\n\nb<|im_end|>"]
    assert targets(template, messages, "last") == ["<think>\nhow\n</think>\n\nb<|im_end|>"]
    assert targets(template, [*messages, {"role": "user", "content": "w"}]) == ["a<|im_end|>", "b<|im_end|>"]
    spelled = conversation("u", "<think>\nwhy\n</think>\n\n<|im_end|>", "v", "b")
    assert targets(template, spelled)[0] == "<|im_end|><|im_end|>"
    messages[1] = {"role": "assistant", "content": "<a>", "reasoning_content": "r"}
    assert targets(template, messages)[0] == "<a><|im_end|>"
    assert targets(template, messages[:2]) == ["<think>\nr\n</think>\n\n<a><|im_end|>"]


def test_a_prompt_that_begins_the_thought(tokenizer):
    """The prompt ends with `<think>`, which the turn does not have: what both begin with must not eat its first `<`."""
    source = """{{- bos_token }}{% for m in messages %}
    {%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
    {%- else %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    messages = conversation("u", "<think>\nx</think><b>", "v", "<think", "w", "t", "x", "")
    assert targets(template, messages) == ["<b></s>", "<think</s>", "t</s>", "</s>"]


def test_a_prompt_that_begins_a_thought_which_earlier_turns_lose(tokenizer):
    source = THOUGHTS.replace(
        "'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<think>\\n' }}{% endif"
    )
    template = encoder(tokenizer, source).template
    messages = conversation("u", "<think>\nwhy\n</think>\n\na<|im_end|>", "v", "b", "w", "<think>\nhow\n</think>\n\n<c")
    assert template.prompt(messages[:1]).endswith("assistant\n<think>\n")
    expected = ["a<|im_end|><|im_end|>", "b<|im_end|>", "how\n</think>\n\n<c<|im_end|>"]
    assert targets(template, messages) == expected
    assert targets(template, messages, "last") == expected[-1:]


def test_thoughts_that_are_written_otherwise_later_on(tokenizer):
    kept = "{{ '<think>' + thought + '</think>' + said }}{% endif %}"
    source = THOUGHTS.replace("{{ said }}{% endif %}", kept)
    source = source.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<think>\\n' }}{% endif")
    messages = conversation("u", "a", "v", "b")
    messages[1]["reasoning_content"] = "r"
    assert targets(encoder(tokenizer, source).template, messages)[0] == "r</think>a<|im_end|>"


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
    assert targets(template, messages) == [" a</s>", " [INST] b</s>", " a</s>"]
    assert targets(template, messages, "last") == [" a</s>"]


def test_an_end_of_text_behind_the_last_turn(tokenizer):
    source = """{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
    chat = encoder(tokenizer, source)
    assert chat.end_of_turn_id == tokenizer.special_tokens["<|end|>"]
    assert targets(chat.template, conversation("u", "a", "v", "b<|end|>")) == ["a<|end|>", "b<|end|><|end|>"]


def test_earlier_turns_that_are_trimmed(tokenizer):
    source = """{%- for m in messages %}{{ '<|' + m.role + '|>' }}
    {{- m.content if loop.last else m.content | trim }}{{ '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    assert targets(template, conversation("u", " a ", "v", " b ")) == ["a<|end|>", " b <|end|>"]


def test_earlier_turns_that_become_others_are_an_error(tokenizer):
    said = "message['content'] + '<|im_end|>'"
    changed = "(message['content'] if loop.last or message['role'] in roles else 'so') + '<|im_end|>'"
    source = "{% set roles = ['user'] %}" + CHATML.replace(said, changed)
    template = encoder(tokenizer, source).template
    assert targets(template, conversation("u", "a")) == ["a<|im_end|>"]
    with pytest.raises(ConversationError, match=r"message 1: .*differently in a longer conversation"):
        template.render(conversation("u", "a", "v", "b"))
    template = encoder(tokenizer, source.replace("['user']", "['assistant']")).template
    with pytest.raises(ConversationError, match=r"message 1: .*where this assistant turn begins"):
        template.render(conversation("u", "a"))


def test_earlier_turns_that_are_left_out_are_an_error(tokenizer):
    """The user says the same then, under the same header."""
    source = """{%- for m in messages %}{% if m.role == 'user' or loop.last %}
    {{- '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    assert targets(template, conversation("u", "a")) == ["a<|im_end|>"]
    with pytest.raises(ConversationError, match=r"message 1: .*drops this assistant turn"):
        template.render(conversation("u", "same", "same", "b"))


def test_more_turns_than_can_be_searched_for(tokenizer):
    many = conversation(*["hi"] * 320)
    assert len(targets(encoder(tokenizer, BUILTIN["chatml"].source).template, many)) == 160
    template = encoder(tokenizer, CHATML).template
    for messages in (many, conversation(*["hi" * 100_000] * 40)):
        with pytest.raises(ConversationError, match=r"turns .* too many to find without {% generation %} blocks"):
            template.render(messages)
    assert len(targets(template, many, "last")) == 1


@pytest.mark.parametrize("prompt", ["", "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"])
@pytest.mark.parametrize("said", ["u", "[INST] u[/INST]", " "])
def test_a_system_message_in_the_last_message_if_it_is_the_users(tokenizer, said, prompt):
    """As Mistral 7B v0.3 and Nemo have it: never in a whole conversation, always in a prompt."""
    source = """{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}{{- bos_token }}
{%- for m in turns %}{% if m.role == 'user' %}
    {{- '[INST] ' + (messages[0].content + '\\n\\n' if loop.last and messages[0].role == 'system' else '') }}
    {{- m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
    template = encoder(tokenizer, source + prompt).template
    messages = conversation(said, "a", "v", "b", system="S")
    assert template.prompt(messages[:2]).startswith(f"<s>[INST] S\n\n{said}")
    if not said.strip():
        with pytest.raises(ConversationError, match="where this assistant turn begins"):
            template.render(messages)
        return
    begin = "" if prompt else " "
    assert targets(template, messages) == [begin + "a</s>", begin + "b</s>"]


CALLS = """{% for m in messages %}{% if m.tool_calls %}{{ '<|assistant|>' }}{% for c in m.tool_calls %}
    {{- '[' + (c.function or c).name + ']' }}{% endfor %}{{ '<|end|>' }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content + '<|end|>' }}
{%- elif m.role != 'system' %}{{ '<|user|>' }}
    {%- if loop.last and messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% endif %}{{ m.content }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


@pytest.mark.parametrize("call", [{"function": {"name": "mill"}}, {"name": "mill"}], ids=["function", "name"])
def test_a_turn_of_calls_whose_content_is_not_written(tokenizer, call):
    """And whose prompt has the system message, which moves to the last user message, as Mistral's templates have it."""
    messages = [*conversation("u", "unwritten", "v", "b", system="s")]
    messages[2]["tool_calls"] = [call, call]
    assert targets(encoder(tokenizer, CALLS).template, messages) == ["[mill][mill]<|end|>", "b<|end|>"]


def test_whitespace_that_follows_a_message_only_in_a_prompt(tokenizer):
    """As behind the results of tools in the template of Hermes."""
    source = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
    {%- if not loop.last %}{{ ' \n' }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    said = ["a" * 3, "<|im_start|>assistant\nb"]
    for question in ("u (v)", "<|im_start|>assistant\n", "a"):
        found = targets(template, conversation(question, said[0], question, said[1]))
        assert found == [f"{said[0]} \n<|im_end|>", f"{said[1]}<|im_end|>"]


def test_another_end_in_the_middle_of_a_conversation(tokenizer):
    """As in the template of gpt-oss."""
    source = """{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content }}
    {{- '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"""
    template = encoder(tokenizer, source).template
    assert targets(template, conversation("u", "a", "v", "b")) == ["a<|im_end|>", "b</s>"]
    assert targets(template, conversation("u", "", "v", "<|im_end|>", "w", "b")) == [
        "<|im_end|>", "<|im_end|><|im_end|>", "b</s>"
    ]  # fmt: skip
    dotted = encoder(tokenizer, source.replace("m.content }}", "m.content + ('' if loop.last else '.') }}")).template
    with pytest.raises(ConversationError, match="message 1: the template"):
        targets(dotted, conversation("u", "a", "v", "b"))


@pytest.mark.parametrize("begin", ["<|im_start|>user\\n", "<s><|im_start|>", "<s>"])
def test_a_token_that_begins_the_next_turn_is_not_the_end_of_one(tokenizer, begin):
    source = """{% for m in messages %}{% if m.role == 'user' %}{{ 'BEGIN' + m.content + '<|user|>' }}
    {%- else %}{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"""
    template = encoder(tokenizer, source.replace("BEGIN", begin)).template
    with pytest.raises(ConversationError, match="message 1: the template renders this assistant turn differently"):
        targets(template, conversation("u", "a", "v", "b"))
