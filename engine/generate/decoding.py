"""Autoregressive decoding with a key/value cache, for one or several prompts.

Prefill runs prompt by prompt; then all sequences advance together, one token per step, and finished sequences leave the
batch. The random numbers of a prompt depend only on the seed and the prompt's number, so its text does not depend on
the rest of the batch. Tensor-parallel ranks have the same logits and random numbers and therefore sample the same
tokens: only prompts are communicated. Alternative considered: padding prompts to one length and one prefill for all,
which wastes work and needs a padding mask.

Legend: b sequences, t tokens, h hidden size, v vocabulary.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from engine.config.schema import ModelConfig
from engine.errors import ConfigError
from engine.generate.cache import KeyValueCache
from engine.model.decoder import Decoder
from engine.parallel.collectives import gather_sequence

LOWEST_TEMPERATURE = (
    1e-3  # smallest nonzero: smaller ones may overflow the logits, and decoding is nearly greedy anyway
)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of the next token.

    Attributes:
        temperature: 0 for greedy decoding; otherwise logits are divided by it.
        top_p: sample from the smallest set of tokens with at least this total probability.
        seed: seed for sampling.

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
    """Yield token ids that continue one prompt, number 0; see `generate_batch`."""
    batch = generate_batch(decoder, {0: prompt}, max_new_tokens, sampling, stop, vocab_size)
    return (token for _, token in batch)


def generate_batch(
    decoder: Decoder,
    prompts: Mapping[int, Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: frozenset[int] = frozenset(),
    vocab_size: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue several prompts. A collective of the tensor-parallel ranks, all with the same arguments.

    Args:
        prompts: token ids by prompt number; the number is part of the seed of the prompt's random numbers.
        max_new_tokens: maximum per prompt.
        sampling: sampling parameters.
        stop: ids that end a sequence; they are not yielded.
        vocab_size: the tokenizer's; higher ids of the model are padding and are never sampled.

    Yields:
        (prompt number, next token id) as soon as it is sampled; the same on every rank.

    Raises:
        ConfigError: a prompt is empty, or prompt and new tokens exceed the model's `max_position`.
    """
    for prompt in prompts.values():
        require_room(decoder.config, len(prompt), max_new_tokens)
    # a separate generator function, so that the checks above run before the first token is requested
    return _continue(decoder, prompts, max_new_tokens, sampling, stop, vocab_size)


def require_room(model: ModelConfig, prompt_tokens: int, max_new_tokens: int) -> None:
    """Check that a prompt can be continued.

    Raises:
        ConfigError: it is empty, or prompt and new tokens exceed the model's `max_position`, or they cross LongRoPE's
            `original_max_position`.
    """
    if prompt_tokens == 0:
        raise ConfigError("the prompt is empty: it has no tokens to continue")
    if prompt_tokens + max_new_tokens > model.max_position:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones are more than the model's "
            f"max_position = {model.max_position}; shorten the prompt or lower max_new_tokens"
        )
    scaling = model.rope_scaling
    original = scaling.original_max_position if scaling and scaling.rope_type == "longrope" else 0
    if prompt_tokens <= original < prompt_tokens + max_new_tokens:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones cross the model's "
            f"rope_scaling.original_max_position = {original}, beyond which all positions of a text change; lower "
            f"max_new_tokens to {original - prompt_tokens}"
        )


@torch.no_grad()
def _continue(
    decoder: Decoder,
    prompts: Mapping[int, Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: frozenset[int],
    vocab_size: int | None,
) -> Iterator[tuple[int, int]]:
    assert decoder.embedding is not None
    weight, tp = decoder.embedding.weight, decoder.embedding.tp
    capacity = max(map(len, prompts.values())) + max_new_tokens
    cache = KeyValueCache(decoder.config, len(prompts), capacity, weight.dtype, weight.device, tp)
    numbers = list(prompts)  # prompt number of each row of the cache
    random = {number: _random(sampling.seed, number) for number in numbers}
    prefill = (torch.tensor(prompt, device=weight.device) for prompt in prompts.values())
    logits = torch.cat([_next_logits(decoder, cache, range(i, i + 1), tokens) for i, tokens in enumerate(prefill)])
    for left in range(max_new_tokens - 1, -1, -1):
        uniform = torch.cat([torch.rand(1, dtype=torch.float64, generator=random[number]) for number in numbers])
        tokens = sample_next(logits[:, :vocab_size].float(), sampling, uniform)
        drawn = tokens.tolist()
        unfinished = [row for row, token in enumerate(drawn) if token not in stop]
        yield from ((numbers[row], drawn[row]) for row in unfinished)
        if not unfinished or not left:
            return
        if len(unfinished) < len(numbers):
            cache.keep(unfinished)
            numbers, tokens = [numbers[row] for row in unfinished], tokens[unfinished]
        logits = _next_logits(decoder, cache, range(len(numbers)), tokens)


def _next_logits(decoder: Decoder, cache: KeyValueCache, rows: range, tokens: torch.Tensor) -> torch.Tensor:
    """Run `tokens` [b·t], t per sequence, through the decoder. Return the next-token logits [b, v] of `rows`."""
    assert decoder.head is not None
    tp, count = decoder.head.tp, len(tokens) // len(rows)
    positions, attend = cache.extend(rows, count)
    padding = -len(tokens) % tp.size  # ranks have equal shares of the tokens
    tokens, positions = (functional.pad(x, (0, padding)) for x in (tokens, positions))
    hidden = gather_sequence(decoder(tokens, positions, attend), tp.group)  # [b·t + padding, h]
    logits = decoder.logits(hidden[count - 1 : len(rows) * count : count])  # [b, v/tp]
    if tp.size == 1:
        return logits
    largest = -(-decoder.config.vocab_size // tp.size)
    parts = functional.pad(logits, (0, largest - logits.shape[1])).t().contiguous()
    shares = [replace(tp, rank=rank).share(decoder.config.vocab_size)[1] for rank in range(tp.size)]
    gathered = gather_sequence(parts, tp.group).split(largest)
    return torch.cat([part[:share] for part, share in zip(gathered, shares, strict=True)]).t().contiguous()


def sample_next(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Sample tokens [b], int64, from logits [b, v], fp32, and uniform random numbers [b] in [0, 1), fp64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = torch.softmax(logits / sampling.temperature, -1).sort(descending=True, stable=True)
    reached = probabilities.double().cumsum(-1)
    # Keep the tokens before which the cumulative probability is below top_p.
    kept = (reached - probabilities < sampling.top_p).sum(-1, keepdim=True)
    # In fp64, so that rounding cannot reach past the last kept token.
    wanted = uniform.to(logits.device)[:, None] * reached.gather(1, kept - 1)
    return order.gather(1, torch.searchsorted(reached, wanted, right=True))[:, 0]


def _random(seed: int, number: int) -> torch.Generator:
    """Return the random generator of a prompt, on the host, so that all devices sample the same tokens."""
    key = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
