"""Text in, text out: a decoder with its tokenizer and, for conversations, its chat template.

Ranks that share the layers work as one: rank 0 chooses the prompts and uses the text, the others run `serve_rank`.
Files and the terminal belong to rank 0 alone, and every rank runs the same steps of the decoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from engine.data.chat.compiled import Message
from engine.data.chat.encoder import ChatEncoder
from engine.data.tokenizers.protocol import Tokenizer
from engine.data.tokenizers.stream import stream_text
from engine.errors import ConfigError
from engine.generate.decoding import Sampling, generate_batch, require_room
from engine.model.decoder import Decoder
from engine.parallel.agreement import broadcast_ints
from engine.parallel.layout import World


@dataclass(frozen=True)
class TextGenerator:
    """Generates text with a decoder, on one rank or on all that share its layers.

    Attributes:
        world: this rank among those that share the layers.
        max_new_tokens: the most tokens that a prompt is continued by.
        stop: ids that end a generated text.
        chat: encodes conversations; None for a model that continues texts.
        bos: begin texts with the tokenizer's beginning-of-text token; a chat template adds its own.
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
        """Token ids of a text to continue."""
        first = [self.tokenizer.bos_id] if self.bos and self.tokenizer.bos_id is not None else []
        return [*first, *self.tokenizer.encode(text)]

    def message_ids(self, messages: list[Message], tools: Any = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
            ConversationError: the template refuses the messages.
        """
        assert self.chat is not None
        return self.chat.prompt_ids(messages, tools)

    def continue_text(self, text: str) -> Iterator[str]:
        """The text and its continuation, streamed: a string for each token, and a last one.

        Raises:
            ConfigError: it is empty or too long.
        """
        ids = self.text_ids(text)
        new = self.write({0: ids}, self.max_new_tokens)
        return stream_text(self.tokenizer, chain(ids, (token for _, token in new)))

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The assistant's next message, streamed: a string for each token, and a last one.

        It has at most `max_new_tokens`, and fewer where the model's `max_position` leaves less room.

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
        """By the prompt's number: `completion`, `num_tokens` and `stopped`; or `error` for one that is too long."""
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
        """Special tokens, which a badly trained model may generate and an answer must not show."""
        return set(self.tokenizer.special_tokens.values())

    def write(self, prompts: Mapping[int, Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, int]]:
        """As `generate_batch`, on rank 0, which must consume all tokens: the other ranks run along."""
        tokens = self._generate(prompts, max_new_tokens)
        message = [max_new_tokens]
        for number, prompt in prompts.items():
            message += [number, len(prompt), *prompt]
        broadcast_ints(self.world, message)
        return tokens

    def serve_rank(self) -> None:
        """Take part in what rank 0 generates, until its `shutdown`; the loop of the other ranks."""
        while message := broadcast_ints(self.world, []):
            max_new_tokens, rest = message[0], message[1:]
            prompts = {}
            while rest:
                number, length = rest[:2]
                prompts[number], rest = rest[2 : 2 + length], rest[2 + length :]
            for _ in self._generate(prompts, max_new_tokens):
                pass

    def shutdown(self) -> None:
        """End `serve_rank` on the other ranks; called by rank 0."""
        broadcast_ints(self.world, [])

    def _generate(self, prompts: Mapping[int, Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, int]]:
        return generate_batch(
            self.decoder, prompts, max_new_tokens, self.sampling, self.stop, self.tokenizer.vocab_size
        )
