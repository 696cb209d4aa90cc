"""Ids and target masks of conversations, held against those of transformers."""

import json

import pytest

from engine.data.chat.builtin import BUILTIN
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.find import find_template
from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.load import load_tokenizer
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece
from tests.data.chat.examples import (
    conversation,
    encoder,
    random_conversations,
)

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
TOOL = {"type": "function", "function": {"name": "look_up", "description": "é <b>", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", [*BUILTIN, "calls", "conditions"])
def test_ids_and_mask_are_those_of_transformers(folder, tokenizer, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tools = [TOOL] if name == "calls" else None
    own = {"calls": CALLS, "conditions": CONDITIONS}
    ours = encoder(tokenizer, own[name]) if name in own else ChatEncoder(tokenizer, find_template(tokenizer, name))
    num_targets = 0
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
        num_targets += mask.sum()
    assert num_targets > 1000


@pytest.mark.parametrize("sides", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
def test_special_tokens_that_swallow_white_space(folder, tmp_path, sides):
    """Headers are no targets for taking white space that the answer begins with, or that follows it."""
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
        expected = [any(s < end and e > start and s < e for start, end in rendered.targets) for s, e in spans]
        assert chat.encode(messages)[1].tolist() == expected


def test_special_tokens_in_messages_are_seen(tokenizer):
    chat = ChatEncoder(tokenizer, find_template(tokenizer, "chatml"))
    assert not chat.spells_special(conversation("a < b |im_end| s>", "x", system=""))
    assert chat.spells_special(conversation("u", "x</s>y"))
    assert chat.spells_special(
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"q": ["<|im_end|>"]}}}]}]
    )


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
