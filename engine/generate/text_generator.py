"""Generates text with a decoder, its tokenizer and, for conversations, its chat template.

With tensor parallelism, rank 0 chooses the prompts and uses the text, and the other ranks run `serve_rank`. Only rank 0
uses files and the terminal; all ranks run the same steps of the decoder.
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
    """Generates text with a decoder, on one rank or a tensor-parallel group.

    Attributes:
        world: this rank and its tensor-parallel group.
        sampling: sampling parameters.
        max_new_tokens: maximum number of new tokens per prompt.
        stop: ids that end a generated text.
        chat: encodes conversations; None for a model that continues texts.
        bos: begin texts with the tokenizer's beginning-of-text token; chat templates write their own.
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
        """Encode a text to continue."""
        first = [self.tokenizer.bos_id] if self.bos and self.tokenizer.bos_id is not None else []
        return [*first, *self.tokenizer.encode(text)]

    def message_ids(self, messages: list[Message], tools: Any = None) -> list[int]:
        """Encode a conversation up to the beginning of the next assistant turn.

        Raises:
            ConversationError: the template cannot render the messages.
        """
        assert self.chat is not None
        return self.chat.prompt_ids(messages, tools)

    def continue_text(self, text: str) -> Iterator[str]:
        """Stream a text and its continuation: one string per token, then a last one.

        Raises:
            ConfigError: the text is empty or too long.
        """
        ids = self.text_ids(text)
        new = self.write({0: ids}, self.max_new_tokens)
        return stream_text(self.tokenizer, chain(ids, (token for _, token in new)))

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """Stream the next assistant message: one string per token, then a last one.

        It has at most `max_new_tokens` tokens, or fewer if the model's `max_position` is reached.

        Raises:
            ConversationError: the template cannot render the messages.
            ConfigError: the messages are too long.
        """
        ids, limit = self.message_ids(messages), self.decoder.config.max_position
        if len(ids) >= limit:
            raise ConfigError(f"the conversation has {len(ids)} tokens, and the model reads at most {limit}")
        new = self.write({0: ids}, min(self.max_new_tokens, limit - len(ids)))
        return stream_text(self.tokenizer, (token for _, token in new if token not in self._control))

    def answer_batch(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, dict[str, Any]]:
        """Answer prompts. Return by number `completion`, `num_tokens` and `stopped`, or `error` if it is too long."""
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
        """The ids of special tokens, which are removed from answers; a badly trained model may generate them."""
        return set(self.tokenizer.special_tokens.values())

    def write(self, prompts: Mapping[int, Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, int]]:
        """Run `generate_batch` from rank 0, which must consume all tokens, because the other ranks run all steps."""
        tokens = self._generate(prompts, max_new_tokens)
        message = [max_new_tokens]
        for number, prompt in prompts.items():
            message += [number, len(prompt), *prompt]
        broadcast_ints(self.world, message)
        return tokens

    def serve_rank(self) -> None:
        """Run the loop of the other ranks: generate along with rank 0 until it calls `shutdown`."""
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
