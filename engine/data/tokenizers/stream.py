"""Text from ids that arrive one by one, as a model generates them."""

from collections.abc import Iterable, Iterator

from engine.data.tokenizers.protocol import Tokenizer

REPLACEMENT = "\ufffd"  # the replacement character, decoded from incomplete UTF-8


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yields the text that each id makes final; joined it is `decode` of all ids. One more string comes at the end.

    A character whose bytes span several ids comes with the last of them; the earlier strings are empty. Only a few ids
    are decoded at each step, so the cost does not grow with the text.
    """
    recent: list[int] = []
    shown = 0  # how many of `recent` were yielded; they stay as context, because decoders strip a leading space
    for token in ids:
        recent.append(token)
        text = tokenizer.decode(recent)
        if text.endswith(REPLACEMENT):
            yield ""
            continue
        yield text[len(tokenizer.decode(recent[:shown])) :]
        if tokenizer.decode(recent[shown:]):  # ids without text of their own are no context
            recent = recent[shown:]
        shown = len(recent)
    yield tokenizer.decode(recent)[len(tokenizer.decode(recent[:shown])) :]
