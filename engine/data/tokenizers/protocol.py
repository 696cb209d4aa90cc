"""The tokenizer interface, the only one that the engine uses.

Each kind of tokenizer has a separate file in this package, and `load.py` chooses between them. A file format whose
tokenizer a `tokenizer.json` can express is converted to one, as in `byte_level_bpe.py`. A new kind also needs the name
of its model file in `MODEL_FILES` of `files.py`, and its export in
`engine/checkpoint/huggingface/tokenizer_files.py`, which rejects unknown kinds. `encode` never adds a beginning or end
token; the code that builds documents does. Alternative considered: `transformers.AutoTokenizer`, which takes seconds to
import and may run code that comes with a model.
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
    """The largest id plus one."""
    eod_id: int
    """The end-of-document token."""
    bos_id: int | None
    """The beginning-of-text token; None if the tokenizer has none."""
    adds_bos: bool
    """Whether `transformers` starts a plain text with `bos_id`, by the tokenizer's files; `encode` never does."""
    hash: str
    """The xxh3-64 hash of the model file; tokenizers with the same hash give the same ids."""
    files: list[Path]
    """The files that a checkpoint or an export must copy."""
    special_tokens: dict[str, int]
    """Ids of the special tokens, by their text."""
    note: str | None
    """Which of several files was read, and why; None if there was no choice."""

    @property
    def encoder(self) -> str:
        """The library that encodes text, with the reason if it is not the fast one."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        """Encode a text; spelled-out special tokens become these tokens. Return ids and the span of text of each id.

        Spans are in order. Ids that share one character have the same span.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Decode `ids`; invalid UTF-8 becomes U+FFFD."""
