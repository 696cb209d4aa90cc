"""The interface of a tokenizer, and nothing else of it is used in the engine.

Each kind of tokenizer has a file of its own here, and `load.py` chooses between them. A new kind is a new file and a
line there. `encode` never adds a beginning or an end; the code that
builds documents appends `eod_id`. Alternative considered: `transformers.AutoTokenizer`, which takes seconds to import
and may run code that comes with a model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer[Any]]
Span = tuple[int, int]  # [start, end) in characters


class Tokenizer(Protocol):
    """Encodes text to ids and decodes ids to text."""

    kind: str
    """`sentencepiece`, `huggingface` or `byte`."""
    vocab_size: int
    """Number of ids: the largest plus one."""
    eod_id: int
    """Ends a document."""
    bos_id: int | None
    hash: str
    """xxh3-64 of the model file; tokenizers with the same hash give the same ids."""
    files: list[Path]
    """The files that a checkpoint or an export has to copy."""
    special_tokens: dict[str, int]
    """Ids of the special tokens, by their text."""

    @property
    def encoder(self) -> str:
        """The program that encodes text, and why it was chosen."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of a text in which spelled-out special tokens become these tokens, and the span of text of each id.

        Spans never go backwards. Several ids of one character have the same span.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD."""
