"""Generation: one token after another from a decoder with a key/value cache."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.errors import ConfigError
from engine.model.attention import KeyValueCache
from engine.model.decoder import Decoder

LOWEST_TEMPERATURE = 1e-3  # above 0; logits divided by less may overflow, and it is greedy all the same


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_p: draw only from the smallest set of tokens that together have at least this probability.
        seed: of the draws.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature}: expected 0 (greedy), or {LOWEST_TEMPERATURE} or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: expected more than 0 and at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed = {self.seed}: expected 0 or more, below 2^63")


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: frozenset[int] = frozenset(),
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Token ids that continue `prompt`, each as soon as it is known; a token of `stop` ends it and is not given.

    Args:
        vocab_size: of the tokenizer; the model's further ids are padding and never drawn.

    Raises:
        ConfigError: the prompt is empty, or prompt and new tokens are longer than the model is made for.
    """
    limit = decoder.config.max_position
    if not prompt:
        raise ConfigError("the prompt is empty: it has no tokens to continue")
    if len(prompt) + max_new_tokens > limit:
        raise ConfigError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones are more than the model's "
            f"max_position = {limit}; shorten the prompt or lower --max-new-tokens"
        )
    # a generator of its own, so that the checks above come before the first token is asked for
    return _continue(decoder, prompt, max_new_tokens, sampling, stop, vocab_size)


@torch.no_grad()
def _continue(
    decoder: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: frozenset[int],
    vocab_size: int | None,
) -> Iterator[int]:
    assert decoder.embedding is not None
    embedding = decoder.embedding.weight
    cache = KeyValueCache(decoder.config, len(prompt) + max_new_tokens, embedding.dtype, embedding.device)
    random = torch.Generator(device=embedding.device).manual_seed(sampling.seed)
    tokens = torch.tensor(prompt, device=embedding.device)
    for _ in range(max_new_tokens):
        positions = torch.arange(cache.length, cache.length + len(tokens), device=embedding.device)
        hidden = decoder(tokens, positions, cache.attend)
        cache.advance(len(tokens))
        tokens = draw(decoder.logits(hidden[-1:])[0, :vocab_size].float(), sampling, random)
        token = int(tokens)
        if token in stop:
            return
        yield token


def draw(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> torch.Tensor:
    """The next token, of shape [1], given fp32 logits [v]."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
    probabilities[before >= sampling.top_p] = 0
    return order[torch.multinomial(probabilities, 1, generator=random)]
