import os

import pytest
import torch
from torch import nn

from engine.config.schema import ModelConfig
from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.errors import ConversationError
from engine.data.chat.template import ChatTemplate
from engine.data.tokenizers.byte import ByteTokenizer
from engine.errors import ConfigError
from engine.generate.decoding import Sampling
from engine.generate.text_generator import TextGenerator
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import parameter_table
from engine.parallel.layout import Layout
from engine.parallel.table import initialize
from engine.testing.distributed import run_ranks, world_of
from engine.testing.models import tiny_config

PROMPTS = {7: [1, 2, 3, 4, 5, 6, 7, 8, 9], 2: [5], 0: [6, 7, 8], 9: list(range(40))}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def new_generator(model: ModelConfig, max_new_tokens: int, stop: frozenset[int], sampling: Sampling) -> TextGenerator:
    """This rank's, of byte tokens, for conversations as well."""
    world = world_of(Layout(tp=int(os.environ.get("WORLD_SIZE", 1))))
    parameters = {}
    for parameter in parameter_table(model, tp=world.tp).parameters:
        values = torch.empty(parameter.shape)
        initialize(parameter, values, 1)
        parameters[parameter.path] = nn.Parameter(values, requires_grad=False)
    tokenizer, decoder = ByteTokenizer(), Decoder(model, Parameters(parameters), tp=world.tp)
    special = {text: i for text, i in tokenizer.special_tokens.items() if i == tokenizer.eod_id}
    template = ChatTemplate("test", TEMPLATE, dict.fromkeys(("eos_token",), *special), tuple(special))
    return TextGenerator(decoder, tokenizer, world, sampling, max_new_tokens, stop, ChatEncoder(tokenizer, template))


def write_on_ranks(model: ModelConfig) -> tuple[list[dict[int, list[int]]], int]:
    """What rank 0 gets for some prompts, one batch after another, and how many values this rank holds."""
    got = []
    for temperature in (0.0, 1.0):
        generator = new_generator(model, 12, frozenset({5}), Sampling(temperature, 0.9, seed=3))
        if not generator.world.is_main:
            generator.serve_rank()
            continue
        for numbers in ((7, 2), (0, 9)):
            ids: dict[int, list[int]] = {number: [] for number in numbers}
            for number, token in generator.write({number: PROMPTS[number] for number in numbers}, 12):
                ids[number].append(token)
            got.append(ids)
        generator.shutdown()
    return got, sum(parameter.numel() for parameter in generator.decoder.parameters())


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"num_heads": 4, "num_kv_heads": 2, "vocab_size": 259}, 4),  # two ranks hold the same keys and values
        ({"sliding_window": 5, "tie_embeddings": True, "vocab_size": 259}, 2),
    ],
)
def test_ranks_that_share_the_layers_write_what_one_writes(changes, ranks):
    model = tiny_config(init_std=0.1, **changes)
    alone, whole = run_ranks(1, write_on_ranks, model)[0]
    results = run_ranks(ranks, write_on_ranks, model)
    assert results[0][0] == alone
    assert any(len(ids) not in (0, 12) for batch in alone for ids in batch.values()) or alone[0] != alone[2]
    assert all(part < whole * 0.7 for _, part in results)


@pytest.fixture(scope="module")
def generator():
    model = tiny_config(init_std=0.1, vocab_size=259, max_position=64)
    return new_generator(model, 20, frozenset({256}), Sampling())


def test_text_is_continued_in_pieces(generator):
    ids = [token for _, token in generator.write({0: [*b"abc"]}, 20)]
    pieces = list(generator.continue_text("abc"))
    assert len(pieces) == 3 + len(ids) + 1
    assert "".join(pieces) == "abc" + bytes(ids).decode(errors="replace")
    with pytest.raises(ConfigError, match="60 prompt tokens and 20 new ones"):
        generator.continue_text("a" * 60)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generator.continue_text("")


def test_an_answer_takes_the_room_that_is_left(generator):
    def said(length: int) -> int:
        return len(list(generator.answer([{"role": "user", "content": "x" * length}]))) - 1

    assert len(generator.message_ids([{"role": "user", "content": "x" * 40}])) == 45
    assert said(58) == 1
    assert said(50) == 9
    assert said(1) == 20
    with pytest.raises(ConfigError, match="the conversation has 64 tokens, and the model reads at most 64"):
        said(59)
    with pytest.raises(ConversationError, match="no tools"):
        generator.answer([{"role": "tool", "content": "x"}])


def test_a_batch_has_what_each_prompt_has_alone(generator):
    prompts = {3: [*b"abc"], 1: [*b"x" * 60], 2: [], 5: [*b"y"]}
    together = generator.answer_batch(prompts)
    assert list(together) == [3, 1, 2, 5]
    assert together == {number: generator.answer_batch({number: ids})[number] for number, ids in prompts.items()}
    assert "60 prompt tokens and 20 new ones" in together[1]["error"]
    assert "empty" in together[2]["error"]
    assert together[3]["stopped"] == "length"
    assert together[3]["num_tokens"] == 20
    ids = [token for _, token in generator.write({3: prompts[3]}, 20)]
    assert together[3]["completion"] == bytes(ids).decode(errors="replace")


def test_an_end_of_turn_is_told_and_not_shown(generator):
    ids = [token for _, token in generator.write({0: [*b"abc"]}, 20)]
    stopping = TextGenerator(
        generator.decoder, generator.tokenizer, generator.world, Sampling(), 20, frozenset({ids[4]})
    )
    end = ids.index(ids[4])
    answer = stopping.answer_batch({0: [*b"abc"]})[0]
    expected = {"completion": bytes(ids[:end]).decode(errors="replace"), "num_tokens": end, "stopped": "end of turn"}
    assert answer == expected
    unstopped = TextGenerator(
        generator.decoder, generator.tokenizer, generator.world, Sampling(), 20, frozenset(), generator.chat
    )
    hidden = {"<hidden>": ids[0]}
    unstopped.tokenizer.special_tokens |= hidden
    assert bytes([ids[0]]).decode(errors="replace") not in unstopped.answer_batch({0: [*b"abc"]})[0]["completion"]
