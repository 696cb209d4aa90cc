"""Decodes ids that arrive one by one during generation."""

from collections.abc import Iterable, Iterator

from engine.data.tokenizers.protocol import Tokenizer

REPLACEMENT = "\ufffd"  # the replacement character, decoded from incomplete UTF-8


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text that each id completes, then one last string; joined, they are `decode` of all ids.

    A character whose bytes span several ids is yielded with the last of them; the earlier strings are empty. Each step
    decodes only a few ids, so its cost does not grow with the text.
    """
    recent: list[int] = []
    shown = 0  # ids of `recent` already yielded, kept as context because decoders strip a leading space
    for token in ids:
        recent.append(token)
        text = tokenizer.decode(recent)
        if text.endswith(REPLACEMENT):
            yield ""
            continue
        yield text[len(tokenizer.decode(recent[:shown])) :]
        if tokenizer.decode(recent[shown:]):  # ids that decode to no text cannot be the context
            recent = recent[shown:]
        shown = len(recent)
    yield tokenizer.decode(recent)[len(tokenizer.decode(recent[:shown])) :]
