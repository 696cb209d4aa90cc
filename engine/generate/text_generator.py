"""Text in, text out: a decoder with its tokenizer and, for conversations, its chat template.

Ranks that share the layers work as one: rank 0 decides what is continued and uses the text, the others `follow` it. So
files, the terminal and the person are rank 0's alone, and every rank runs the same steps of the decoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from engine.data.chat.template import ChatEncoder, Message
from engine.data.tokenizers.tokenizer import Tokenizer, stream_text
from engine.errors import ConfigError
from engine.generate.decoding import Sampling, generate_batch, require_room
from engine.model.decoder import Decoder
from engine.parallel.agreement import broadcast_ints
from engine.parallel.layout import World


@dataclass(frozen=True)
class Speaker:
    """A model that writes.

    Attributes:
        chat: how conversations become tokens; None where texts are continued.
        stop: ids that end what it writes.
        bos: begin texts with the tokenizer's beginning-of-text token; a chat template says so itself.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    world: World
    sampling: Sampling
    max_new_tokens: int
    stop: frozenset[int]
    chat: ChatEncoder | None = None
    bos: bool = False

    def text_ids(self, text: str) -> list[int]:
        first = [self.tokenizer.bos_id] if self.bos and self.tokenizer.bos_id is not None else []
        return [*first, *self.tokenizer.encode(text)]

    def message_ids(self, messages: list[Message], tools: Any = None) -> list[int]:
        """Raises ConversationError for what the template refuses."""
        assert self.chat is not None
        return self.chat.prompt_ids(messages, tools)

    def continue_text(self, text: str) -> Iterator[str]:
        """The text and what follows it, a piece for each token and a last one.

        Raises:
            ConfigError: it is empty or too long.
        """
        ids = self.text_ids(text)
        new = self.write({0: ids}, self.max_new_tokens)
        return stream_text(self.tokenizer, chain(ids, (token for _, token in new)))

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """What the assistant says next, a piece for each token and a last one; shorter where the model ends.

        Raises:
            ConversationError: the template refuses the messages.
            ConfigError: they are too long.
        """
        ids, limit = self.message_ids(messages), self.decoder.config.max_position
        if len(ids) >= limit:
            raise ConfigError(f"the conversation has {len(ids)} tokens, and the model reads at most {limit}")
        new = self.write({0: ids}, min(self.max_new_tokens, limit - len(ids)))
        return stream_text(self.tokenizer, (token for _, token in new if token not in self._control))

    def answer_batch(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, dict[str, Any]]:
        """For each prompt, by number: `completion`, `num_tokens` and `stopped`; or the `error` of one too long."""
        answers: dict[int, dict[str, Any]] = {}
        fitting = {}
        for number, ids in prompts.items():
            try:
                require_room(self.decoder.config, len(ids), self.max_new_tokens)
                fitting[number] = ids
            except ConfigError as error:
                answers[number] = {"error": str(error)}
        new: dict[int, list[int]] = {number: [] for number in fitting}
        for number, token in self.write(fitting, self.max_new_tokens) if fitting else ():
            new[number].append(token)
        answers |= {number: self._fields(fitting[number], ids) for number, ids in new.items()}
        return {number: answers[number] for number in prompts}

    def _fields(self, prompt: Sequence[int], new: list[int]) -> dict[str, Any]:
        if self.chat:
            text = self.tokenizer.decode([token for token in new if token not in self._control])
        else:
            text = self.tokenizer.decode([*prompt, *new])[len(self.tokenizer.decode(prompt)) :]
        stopped = "end of turn" if len(new) < self.max_new_tokens else "length"
        return {"completion": text, "num_tokens": len(new), "stopped": stopped}

    @property
    def _control(self) -> set[int]:
        """Symbols that a badly trained model may write and nobody wants to see in an answer."""
        return set(self.tokenizer.special_tokens.values())

    def write(self, prompts: Mapping[int, Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, int]]:
        """As `generate_batch`; for rank 0, which has to ask for all tokens."""
        tokens = self._generate(prompts, max_new_tokens)
        message = [max_new_tokens]
        for number, prompt in prompts.items():
            message += [number, len(prompt), *prompt]
        broadcast_ints(self.world, message)
        return tokens

    def follow(self) -> None:
        """What the other ranks do until `end`."""
        while message := broadcast_ints(self.world, []):
            max_new_tokens, rest = message[0], message[1:]
            prompts = {}
            while rest:
                number, length = rest[:2]
                prompts[number], rest = rest[2 : 2 + length], rest[2 + length :]
            for _ in self._generate(prompts, max_new_tokens):
                pass

    def end(self) -> None:
        """Let the others go; for rank 0."""
        broadcast_ints(self.world, [])

    def _generate(self, prompts: Mapping[int, Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, int]]:
        return generate_batch(
            self.decoder, prompts, max_new_tokens, self.sampling, self.stop, self.tokenizer.vocab_size
        )
