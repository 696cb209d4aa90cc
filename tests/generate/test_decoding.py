import math

import pytest
import torch

from engine.errors import ConfigError
from engine.generate.decoding import Sampling, generate, generate_batch, require_room, sample_next
from engine.model.attention import attend_within
from engine.testing.models import new_decoder, tiny_config

MODEL = tiny_config(init_std=0.1)


def test_greedy_generation_equals_running_the_whole_text_again():
    decoder = new_decoder(MODEL)
    ids = [5, 6, 7]
    for token in generate(decoder, ids.copy(), 12, Sampling()):
        whole = decoder(torch.tensor(ids), torch.arange(len(ids)), attend_within((0, len(ids)), MODEL))
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
    logits = torch.log(torch.tensor([0.5, 0.05, 0.3, 0.15])).expand(300, -1)
    random = torch.Generator().manual_seed(0)

    def drawn(top_p: float, temperature: float = 1.0) -> set[int]:
        uniform = torch.rand(300, dtype=torch.float64, generator=random)
        return set(sample_next(logits, Sampling(temperature, top_p), uniform).tolist())

    assert drawn(0.4) == {0}
    assert drawn(0.6) == {0, 2}
    assert drawn(0.9) == {0, 2, 3}
    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(1.0, temperature=0.01) == {0}


def test_draws_have_the_probabilities_of_the_model():
    probabilities = torch.tensor([0.125, 0.5, 0.0, 0.375])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = sample_next(probabilities.log().expand(1000, -1), Sampling(1.0), uniform)
    assert drawn.bincount(minlength=4).tolist() == [125, 500, 0, 375]
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample_next(probabilities.log().expand(3, -1), Sampling(1.0), edges).tolist() == [1, 3, 0]


PROMPTS = {7: [1, 2, 3, 4, 5, 6, 7, 8, 9], 2: [5], 0: [6, 7, 8], 9: list(range(40))}


def continued(decoder, prompts, new, sampling, stop=frozenset()) -> dict[int, list[int]]:
    ids = {number: [] for number in prompts}
    for number, token in generate_batch(decoder, prompts, new, sampling, stop):
        ids[number].append(token)
    return ids


@pytest.mark.parametrize("preset", ["tiny", "tiny-mistral", "tiny-qwen3", "tiny-starcoder2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_is_beside_a_prompt_changes_nothing(preset, temperature):
    model = tiny_config(preset, init_std=0.1)
    decoder, sampling = new_decoder(model), Sampling(temperature, 0.9, seed=3)
    together = continued(decoder, PROMPTS, 20, sampling)
    alone = {n: continued(decoder, {n: prompt}, 20, sampling)[n] for n, prompt in PROMPTS.items()}
    assert together == alone
    assert together[0] == list(generate(decoder, PROMPTS[0], 20, sampling))
    stop = frozenset({together[2][3], together[9][11]})  # some leave early, the others go on
    shorter = continued(decoder, PROMPTS, 20, sampling, stop)
    for number, ids in together.items():
        end = min((ids.index(token) for token in stop if token in ids), default=20)
        assert shorter[number] == ids[:end]
    assert len({len(ids) for ids in shorter.values()}) > 1


def test_prompts_with_one_text_and_other_numbers_draw_differently():
    ids = continued(new_decoder(MODEL), {0: [1, 2], 1: [1, 2]}, 20, Sampling(1.0))
    assert ids[0] != ids[1]


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


def test_a_text_does_not_cross_the_limit_of_longrope():
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position": 20,
    }
    model = tiny_config(rope_scaling=scaling)
    with pytest.raises(ConfigError, match="lower max_new_tokens to 8"):
        require_room(model, 12, 9)
    require_room(model, 12, 8)
    require_room(model, 21, 100)
    decoder, ids = new_decoder(model), list(range(25))
    for token in generate(decoder, ids.copy(), 5, Sampling()):
        whole = decoder(torch.tensor(ids), torch.arange(len(ids)), decoder.attend_within((0, len(ids))))
        assert token == int(decoder.logits(whole)[-1].argmax())
        ids.append(token)
