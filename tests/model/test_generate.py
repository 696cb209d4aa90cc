import math

import pytest
import torch

from engine.errors import ConfigError
from engine.model.attention import attend_within
from engine.model.generate import Sampling, draw, generate
from engine.testing.models import new_decoder, tiny_config

MODEL = tiny_config(init_std=0.1)


def test_greedy_generation_equals_running_the_whole_text_again():
    decoder = new_decoder(MODEL)
    ids = [5, 6, 7]
    for token in generate(decoder, ids.copy(), 12, Sampling()):
        whole = decoder(torch.tensor(ids), torch.arange(len(ids)), attend_within((0, len(ids)), None))
        assert token == int(decoder.logits(whole[-1:]).argmax())
        ids.append(token)
    assert len(ids) == 15


def test_sampling_repeats_with_its_seed_and_stops():
    decoder = new_decoder(MODEL)
    runs = [list(generate(decoder, [1], 20, Sampling(1.0, 0.9, seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    stop = frozenset({runs[0][4]})
    first = runs[0].index(runs[0][4])
    assert list(generate(decoder, [1], 20, Sampling(1.0, 0.9, 1), stop)) == runs[0][:first]


def test_top_p_draws_only_from_the_likeliest():
    logits = torch.log(torch.tensor([0.5, 0.05, 0.3, 0.15]))
    random = torch.Generator().manual_seed(0)

    def drawn(top_p: float, temperature: float = 1.0) -> set[int]:
        return {int(draw(logits, Sampling(temperature, top_p), random)) for _ in range(300)}

    assert drawn(0.4) == {0}
    assert drawn(0.6) == {0, 2}
    assert drawn(0.9) == {0, 2, 3}
    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(1.0, temperature=0.01) == {0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(([], 5), "the prompt is empty"), (([1] * 10, 4090), "max_position = 4096")],
)
def test_what_cannot_be_generated(arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        generate(new_decoder(MODEL), *arguments, Sampling())  # before the first token is asked for


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_that_the_tokenizer_lacks_are_never_drawn(temperature):
    decoder = new_decoder(MODEL)
    sampling = Sampling(temperature, seed=3)
    assert max(generate(decoder, [1], 40, sampling)) >= 20
    assert max(generate(decoder, [1], 40, sampling, vocab_size=20)) < 20


@pytest.mark.parametrize(
    "values",
    [{"temperature": t} for t in (-1.0, math.nan, math.inf, 1e-45)]
    + [{"top_p": 0.0}, {"top_p": 1.5}, {"top_p": math.nan}, {"seed": 1 << 64}, {"seed": -1}],
)
def test_sampling_out_of_range(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)
