"""Which chat template a tokenizer has."""

import json

import pytest

from engine.data.chat.errors import TemplateError
from engine.data.chat.find import find_template
from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from tests.data.chat.examples import (
    CHATML,
)


def test_the_tokenizers_own_template(tmp_path, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(
        ConfigError, match=r"no chat template; name one with --chat-template: chatml, llama2, llama3, mistral"
    ):
        find_template(load_tokenizer(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for content in ("one", [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": content}))
        assert find_template(load_tokenizer(tmp_path)).source == "one"
    (tmp_path / "chat_template.jinja").write_text("three")
    found = find_template(load_tokenizer(tmp_path))
    assert (found.source, found.name) == ("three", str(tmp_path / "chat_template.jinja"))
    assert (found.special_tokens_map["bos_token"], found.special_tokens_map["eos_token"]) == ("<s>", "</s>")
    assert "pad_token" not in found.special_tokens_map
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
