"""The choice of attention by measuring, with times and packages that are made up: there is no GPU here."""

from itertools import pairwise

import pytest
import torch

from engine.config.schema import OpsConfig
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.ops import attention_choice
from engine.ops.attention import attention_reference
from engine.ops.attention_choice import (
    _MARGIN,
    AttentionImpls,
    AttentionProblem,
    example_documents,
    fastest_that_agrees,
    parse_attention,
    possible_impls,
)
from engine.testing.models import new_parameters, tiny_config

CPU, GPU, HOPPER = torch.device("cpu"), torch.device("cuda", 0), (9, 0)
PACKAGES = ("flash_attn", "flash_attn_3", "flash_attn_4", "cudnn")
DOCUMENTS = AttentionProblem(CPU, torch.bfloat16, 4, 2, 8, (0, 2, 8, 18, 32), None)


@pytest.fixture
def packages(monkeypatch):
    """Names that are installed; all at first."""
    found = set(PACKAGES)
    monkeypatch.setattr(attention_choice, "installed", found.__contains__)
    return found


def problem(dtype=torch.bfloat16, size=128, window=None, plain=True):
    return AttentionProblem(GPU, dtype, 32, 8, size, (0, 4096) if plain else (0, 1000, 4096), window)


def test_candidates(packages):
    """PyTorch's own comes first, then what is installed and supports the problem."""
    flash = ["flash_attn", "flash_attn_3", "flash_attn_4"]
    assert possible_impls(problem(), HOPPER) == ["sdpa", "varlen", *flash]
    assert possible_impls(problem(plain=False), HOPPER) == ["varlen", *flash, "cudnn"]
    assert possible_impls(problem(plain=False, size=256), HOPPER) == ["varlen", *flash]
    assert possible_impls(problem(plain=False), (8, 0)) == ["varlen", "flash_attn", "cudnn"]
    assert possible_impls(problem(torch.float32, plain=False), HOPPER) == ["sdpa"]
    packages.clear()
    assert possible_impls(problem(), HOPPER) == ["sdpa", "varlen"]
    assert possible_impls(problem(plain=False), HOPPER) == ["varlen"]


def test_examples_of_documents():
    """Of different lengths, so that they are not a batch of sequences; on average as long as the data's."""
    assert example_documents(32, 8.0) == (0, 2, 8, 18, 32)
    assert example_documents(32, 1000.0) == (0, 8, 32)
    cuts = example_documents(8192, 1000.0)
    assert (len(cuts) - 1, cuts[-1], max(b - a for a, b in pairwise(cuts))) == (8, 8192, 1920)


def test_names_are_parsed():
    assert parse_attention("flash_attn_4") == "flash_attn_4"
    with pytest.raises(ValueError, match="flash_attn_5"):
        parse_attention("flash_attn_5")


def attention_of(errors):
    """Attention that is right, raises, or is off, by the name of the implementation."""

    def attend(q, k, v, cu_seqlens, window, impl, scores):
        error = errors.get(impl, 0.0)
        if isinstance(error, Exception):
            raise error
        return attention_reference(q, k, v, cu_seqlens, window, scores) * (1 + error)

    return attend


@pytest.fixture
def timed(monkeypatch):
    """`fastest_that_agrees` with made-up errors and seconds."""

    def choose(seconds, errors=None):
        current = []
        attend = attention_of(errors or {})
        monkeypatch.setattr(attention_choice, "attention", lambda *given: (current.append(given[5]), attend(*given))[1])

        def time(call):
            call()
            return seconds[current[-1]]

        return fastest_that_agrees(list(seconds), DOCUMENTS, time)

    return choose


def test_the_fastest_is_taken(timed):
    assert timed({"varlen": 3.0, "flash_attn_4": 2.0, "cudnn": 1.0}) == "cudnn"
    assert timed({"varlen": 1.0, "flash_attn_4": 2.0}) == "varlen"


def test_a_close_one_is_not_taken(timed):
    assert timed({"varlen": 1.0, "cudnn": 1 - _MARGIN / 2}) == "varlen"
    assert timed({"varlen": 1.0, "cudnn": 1 - 2 * _MARGIN}) == "cudnn"


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("no kernel image"), "leaves out cudnn: RuntimeError: no kernel image"),
        (0.1, r"leaves out cudnn: output and gradients are off by 1\.\de-01"),
        (torch.nan, "leaves out cudnn: output and gradients are off by nan, nan"),
    ],
)
def test_what_fails_or_disagrees_is_left_out(timed, error, message):
    with pytest.warns(UserWarning, match=message):
        assert timed({"varlen": 1.0, "cudnn": 0.1, "flash_attn_4": 0.5}, {"cudnn": error}) == "flash_attn_4"


def test_a_model_uses_one_for_sequences_and_one_for_documents(monkeypatch):
    seen = []

    def attend(q, k, v, cu_seqlens, window, impl, scores):
        seen.append(impl)
        return attention_reference(q, k, v, cu_seqlens, window)

    monkeypatch.setattr("engine.model.attention.attention", attend)
    model, tokens = tiny_config(num_layers=1), torch.arange(8)
    measured = AttentionImpls("flash_attn_4", "cudnn")
    for ops, expected in ((OpsConfig(), ["flash_attn_4", "cudnn"]), (OpsConfig(attention="sdpa"), ["sdpa", "sdpa"])):
        decoder = Decoder(model, Parameters(new_parameters(model)), ops=ops, attention=measured)
        for cu_seqlens in ((0, 4, 8), (0, 3, 8)):
            decoder.loss(tokens, tokens, tokens, torch.ones(8), cu_seqlens)
        assert seen == expected
        seen.clear()


def test_a_window_is_not_plain():
    measured = AttentionImpls("sdpa", "varlen", "cudnn")
    assert [measured.of((0, 8, 16), window) for window in (None, 8, 7)] == ["sdpa", "sdpa", "cudnn"]
    assert [measured.of((0, 8, 15), window) for window in (None, 8, 7)] == ["varlen", "varlen", "cudnn"]
