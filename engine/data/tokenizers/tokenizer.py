"""Text to token ids and back: SentencePiece models, Hugging Face `tokenizer.json`, bytes.

One small protocol, so that nothing else in the engine knows which kind it has. The kind is seen from the file's
content, because people rename these files. `encode` never adds a beginning or an end; whoever builds documents
appends `eod_id`. Rejected: `transformers.AutoTokenizer`, which imports for seconds and may run code that comes
with a model.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from engine.data.tokenizers.fast_sentencepiece import FastSentencePiece, UnsupportedModel
from engine.data.tokenizers.sentencepiece_model import BYTE, CONTROL, SPACE, UNKNOWN, fields_of, piece_of, submessage
from engine.errors import ConfigError

Ids = npt.NDArray[np.integer[Any]]
Span = tuple[int, int]  # [start, end) in characters

MODEL_FILES = ("tokenizer.model", "spiece.model", "tokenizer.json")  # looked for in a directory, in this order
CHAT_TEMPLATE = "chat_template.jinja"
COMPANIONS = (  # what transformers keeps beside it
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE, "generation_config.json"
)  # fmt: skip
END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
BYTES_END = "<|endoftext|>"  # what the byte tokenizer's end of document is called
PARTIAL = "\ufffd"  # what decoders put for bytes that are no character (yet)


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer."""

    kind: str
    """`sentencepiece`, `huggingface` or `byte`."""
    vocab_size: int
    """Number of ids: the largest plus one."""
    eod_id: int
    """Ends a document."""
    bos_id: int | None
    hash: str
    """xxh3-64 of the model file: two tokenizers with the same hash give the same ids."""
    files: list[Path]
    """What a checkpoint or an export has to take along."""
    special_tokens: dict[str, int]
    """Ids of the control symbols, by their text."""

    @property
    def encoder(self) -> str:
        """Which program turns text into ids, and why this one."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of a text in which control symbols that are spelt out are meant, and the characters that each stands for.

        Spans never go back. Several ids of one character have the same span.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no character come out as U+FFFD."""


class SentencePieceTokenizer:
    """A SentencePiece model. Control symbols in a text are text for `encode`, as SentencePiece has it.

    Args:
        path: the model file.
        fast: let `encode_batch` use gigatoken where that gives the same ids; see `fast_sentencepiece`.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, *, fast: bool = True) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = _read(path)
        try:
            self._processor = SentencePieceProcessor(model_proto=self._model)
        except RuntimeError:
            raise ConfigError(
                f"{path} ({len(self._model):,} bytes) is neither a SentencePiece model nor a tokenizer.json, or damaged"
            ) from None
        self._wanted = fast
        self.vocab_size: int = self._processor.vocab_size()
        self.eod_id: int = self._processor.eos_id()
        if self.eod_id < 0:
            raise ConfigError(f"{path} has no end-of-sentence piece, which ends documents; train it with eos_id >= 0")
        self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.hash = _hash(self._model)
        self.files = [path, *_companions(path)]
        pieces = [piece_of(value) for number, value in fields_of(self._model) if number == 1]
        self.special_tokens = {piece.text: i for i, piece in enumerate(pieces) if piece.type == CONTROL}
        self._added = {piece.text: i for i, piece in enumerate(pieces) if piece.type in (CONTROL, UNKNOWN)}
        self._cut = _any_of(self._added)
        self._sizes = _piece_sizes(self._model)

    @cached_property
    def _fast(self) -> FastSentencePiece | str:
        """The fast encoder, or why there is none."""
        if not self._wanted:
            return "as asked"
        try:
            return FastSentencePiece(self._processor, self._model)
        except UnsupportedModel as reason:
            return str(reason)

    @property
    def encoder(self) -> str:
        return f"sentencepiece ({self._fast})" if isinstance(self._fast, str) else "gigatoken, checked by sentencepiece"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """As `encode`, for many texts.

        Raises:
            EncoderMismatch: a check found that the fast encoder gives other ids.
        """
        fast = self._fast
        if isinstance(fast, str):
            return [np.array(self._processor.encode(text), np.int32) for text in texts]
        return [fast.encode(text) for text in texts]

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        """As all. What stands between control symbols is encoded on its own, as the exported `tokenizer.json` does."""
        return _encode_parts(text, self._cut, self._added, self._encode_with_spans)

    def _encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        content = text.encode()
        characters = np.cumsum((np.frombuffer(content, np.uint8) & 0xC0) != 0x80)  # that begin up to and with a byte
        if self._sizes is not None:
            ids: list[int] = self._processor.encode(text)
            ends = np.cumsum(self._sizes[ids])
            ends -= ends[-1] - len(content)  # the space in front is no byte of the text
            starts = np.concatenate(([0], ends[:-1]))
            if -1 <= ends[0] - self._sizes[ids[0]] <= 0:
                ends = np.maximum(ends, 1)
                return ids, list(zip((characters[starts] - 1).tolist(), characters[ends - 1].tolist(), strict=True))
        message = self._processor.encode(text, out_type="serialized_proto")  # which all versions have
        pieces = [dict(fields_of(value)) for number, value in fields_of(message) if number == 2]
        before = [*(characters - 1).tolist(), len(text)]  # offsets are in bytes
        spans = [(before[piece.get(4, 0)], before[piece.get(5, 0)]) for piece in pieces]
        return [piece.get(2, 0) for piece in pieces], _filled(spans)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Special tokens that a text spells out become their ids, as in transformers."""

    kind = "huggingface"
    encoder = "tokenizers"

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
            from tokenizers import processors
        except ImportError:
            raise ConfigError(f"{path} needs the package tokenizers: pip install 'triaxis[hf]'") from None
        content = _read(path)
        try:
            self._backend = Backend.from_buffer(content)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ConfigError(f"{path} is not a tokenizer.json or damaged: {error}") from None
        self._backend.no_truncation()  # saved by some trainers, and would silently cut documents
        self._backend.no_padding()
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)  # others cut spaces off the spans
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        end = self._special_id(path, "eos_token", END_NAMES)
        if end is None:
            raise ConfigError(
                f"{path} does not tell which token ends a document; "
                f"put a tokenizer_config.json with `eos_token` beside it"
            )
        self.eod_id = end
        self.bos_id = self._special_id(path, "bos_token", BEGIN_NAMES)
        self.hash = _hash(content)
        self.files = [path, *_companions(path)]
        added = self._backend.get_added_tokens_decoder().items()
        self.special_tokens: dict[str, int] = {token.content: i for i, token in added if token.special}

    def _special_id(self, path: Path, role: str, usual_names: Iterable[str]) -> int | None:
        """The id that `tokenizer_config.json` gives a role; without it, the first usual name among the special tokens.

        Raises:
            ConfigError: the token named there is not in the vocabulary.
        """
        named = _read_json(path.with_name("tokenizer_config.json")).get(role)
        name = named.get("content") if isinstance(named, dict) else named
        if name is not None:
            found: int | None = self._backend.token_to_id(str(name))
            if found is None:
                raise ConfigError(f"{role} = {name!r} of tokenizer_config.json is not in the vocabulary of {path}")
            return found
        special = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        return next((special[name] for name in usual_names if name in special), None)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


class ByteTokenizer:
    """The 256 bytes of UTF-8 and an end of document: for tests and first looks."""

    kind = "byte"
    encoder = "bytes"
    vocab_size = 257
    eod_id = 256
    bos_id: int | None = None
    hash = "byte"

    def __init__(self, template: Path | None = None) -> None:
        self.files = [] if template is None else [template]
        self.special_tokens = {BYTES_END: self.eod_id}
        self._cut = _any_of(self.special_tokens)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode_special(self, text: str) -> tuple[list[int], list[Span]]:
        return _encode_parts(text, self._cut, self.special_tokens, self._encode_with_spans)

    def _encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        return self.encode(text), [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """As all; the end of document has no text."""
        return bytes(i for i in ids if i != self.eod_id).decode(errors="replace")


def load_tokenizer(spec: str | Path, *, fast: bool = True) -> Tokenizer:
    """The tokenizer that `spec` names: `byte`, a SentencePiece model, a `tokenizer.json`, or a directory with one.

    Args:
        spec: as in `data.tokenizer`.
        fast: SentencePiece only: allow the fast encoder.

    Raises:
        ConfigError: there is none, or it is unusable.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    if Path(spec).is_dir() and [path.name for path in Path(spec).iterdir()] == [CHAT_TEMPLATE]:
        return ByteTokenizer(Path(spec) / CHAT_TEMPLATE)  # of a checkpoint: it has no other file
    path = _model_file(Path(spec))
    if _read(path)[:64].lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(path)
    tokenizer = SentencePieceTokenizer(path, fast=fast)
    extended = path.with_name("tokenizer.json")
    if Path(spec).is_dir() and extended.is_file() and _adds_ids(extended, tokenizer.vocab_size):
        return HuggingFaceTokenizer(extended)
    return tokenizer


def _adds_ids(path: Path, vocab_size: int) -> bool:
    """Whether a `tokenizer.json` has tokens that the model beside it lacks, such as those of a chat."""
    added = _read_json(path).get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return any(isinstance(token.get("id"), int) and token["id"] >= vocab_size for token in tokens)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is final, one string an id; joined they are `decode` of all ids.

    A character whose bytes are spread over several ids comes with the last of them; until then strings are
    empty. Only a few ids are decoded at each step, so the cost does not grow with the text.
    """
    recent: list[int] = []
    shown = 0  # how many of `recent` are already out; they stay as context, since a decoder trims a first space
    for token in ids:
        recent.append(token)
        text = tokenizer.decode(recent)
        if text.endswith(PARTIAL):
            yield ""
            continue
        yield text[len(tokenizer.decode(recent[:shown])) :]
        if tokenizer.decode(recent[shown:]):  # ids without text of their own are no context
            recent = recent[shown:]
        shown = len(recent)
    yield tokenizer.decode(recent)[len(tokenizer.decode(recent[:shown])) :]


def _encode_parts(
    text: str,
    cut: re.Pattern[str],
    symbols: Mapping[str, int],
    encode: Callable[[str], tuple[list[int], list[Span]]],
) -> tuple[list[int], list[Span]]:
    """Ids and spans of a text: `symbols` where it spells them out, and what `encode` gives for the parts between."""
    ids: list[int] = []
    spans: list[Span] = []
    at = 0
    for part in cut.split(text):
        if part in symbols:
            ids.append(symbols[part])
            spans.append((at, at + len(part)))
        elif part:
            part_ids, part_spans = encode(part)
            ids += part_ids
            spans += [(at + start, at + end) for start, end in part_spans]
        at += len(part)
    return ids, spans


def _filled(spans: list[Span]) -> list[Span]:
    """Empty spans get the first character of the next that is not: SentencePiece gives a character to its last byte."""
    following: Span | None = None
    for i in range(len(spans) - 1, -1, -1):
        start, end = spans[i]
        if start < end:
            following = spans[i]
        elif following is not None:
            spans[i] = (following[0], following[0] + 1)
    return spans


def _piece_sizes(model: bytes) -> npt.NDArray[np.int64] | None:
    """Bytes of text that each id of a SentencePiece model stands for; None when it rewrites texts, or has unknowns."""
    fields = list(fields_of(model))
    normalizer = submessage(fields, 3)
    if normalizer.get(2) or normalizer.get(4, 1) or not submessage(fields, 2).get(35):  # rules, spaces, byte fallback
        return None
    pieces = [piece_of(value) for number, value in fields if number == 1]
    return np.array([1 if piece.type == BYTE else len(piece.text.replace(SPACE, " ").encode()) for piece in pieces])


def _any_of(symbols: Iterable[str]) -> re.Pattern[str]:
    """Splits a text at symbols and keeps them; the longest wins."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(symbols, key=len, reverse=True)))})")


def _companions(path: Path) -> list[Path]:
    return [path.with_name(name) for name in COMPANIONS if name != path.name and path.with_name(name).is_file()]


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in MODEL_FILES if (path / name).is_file()] or sorted(path.glob("*.model"))
    if not found:
        seen = "a directory without one" if path.is_dir() else "no such file"
        raise ConfigError(
            f"tokenizer {str(path)!r}: {seen}; expected a SentencePiece model, a tokenizer.json, "
            f"a directory that holds one, or `byte`"
        )
    if len(found) > 1 and found[0].name not in MODEL_FILES:
        raise ConfigError(f"tokenizer {str(path)!r}: holds {', '.join(file.name for file in found)}; name one of them")
    return found[0]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the tokenizer {path}: {error.strerror}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no file.

    Raises:
        ConfigError: it is something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON, or nested too deep: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _hash(content: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)
