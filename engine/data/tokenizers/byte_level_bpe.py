"""Definitions of byte-level BPE tokenizers that come as other files than a `tokenizer.json`.

Each is converted to the content of a `tokenizer.json`, which `HuggingFaceTokenizer` reads and an export writes:

- `tekken.json` of mistral-common, which holds its special tokens and the pattern that splits text;
- tiktoken files, one token in base64 and its rank per line. Pattern and special tokens are in the program that reads
  the file, so that only files whose content is known are read (`TIKTOKEN_FILES`): Llama 3's and OpenAI's;
- `vocab.json` and `merges.txt`, where `tokenizer_config.json` names the class (`CLASSES`), which has the pattern.

Alternative considered: encoding with `tiktoken` and `mistral-common`, whose ids an export would have to convert anyway.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.tokenizers.definition import Definition, TokenizerJson, added_token, tokenizer_json
from engine.data.tokenizers.files import CONVERSION, read_tokenizer_file, read_tokenizer_json
from engine.errors import ConfigError

_MAX_SPECIAL, _MAX_TOKEN_BYTES = 100_000, 4096  # in a tekken.json; published ones have 1000 and less than 200
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace("{1,3}", "")
LLAMA3_SPECIAL = (  # as in Llama 3.1; 3.0 has other names for those that it does not use
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)  # fmt: skip
TEKKEN_SPECIAL = (  # of files without a list
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


class Tiktoken(NamedTuple):
    """What a tiktoken file lacks: the pattern that splits text, and the special tokens."""

    name: str
    pattern: str
    special: Mapping[int, str]


TIKTOKEN_FILES = {  # by the SHA-256 of their content, as in the package tiktoken; Llama 3's is the Hub's
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": Tiktoken(
        "Llama 3", CL100K, dict(enumerate(LLAMA3_SPECIAL, 128_000))
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": Tiktoken(
        "cl100k_base", CL100K,
        {100_257: "<|endoftext|>", 100_258: "<|fim_prefix|>", 100_259: "<|fim_middle|>", 100_260: "<|fim_suffix|>",
         100_276: "<|endofprompt|>"},
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": Tiktoken(
        "o200k_base", O200K, {199_999: "<|endoftext|>", 200_018: "<|endofprompt|>"}
    ),
}  # fmt: skip


def definition(path: Path, content: bytes) -> Definition | None:
    """Return the definition of the tokenizer in a model file; None for a file of another kind.

    Args:
        path: the model file, for messages and the files beside it.
        content: of the model file.

    Raises:
        ConfigError: the file is damaged or, for tiktoken files and `vocab.json`, of a kind that is not known.
    """
    if path.name == "vocab.json":
        return Definition(_vocabulary_and_merges(path), [path, path.with_name("merges.txt")])
    if TIKTOKEN_LINE.match(content):
        return Definition(_tiktoken(path, content), [path], adds_bos=True)
    if path.name != "tokenizer.json" and b'"token_bytes"' in content[: 1 << 16]:
        return Definition(_tekken(path), [path], adds_bos=True)
    return None


def is_sentencepiece(content: bytes) -> bool:
    """Whether a model file is neither JSON nor a tiktoken file."""
    return not content[:64].lstrip().startswith(b"{") and not TIKTOKEN_LINE.match(content)


def _tekken(path: Path) -> TokenizerJson:
    """The order of ids is special tokens, then tokens by rank."""
    file = read_tokenizer_json(path)
    try:
        config, entries = file["config"], file.get("special_tokens")
        named = TEKKEN_SPECIAL if entries is None else [entry["token_str"] for entry in _by_rank(entries)]
        size, count = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in _by_rank(file["vocab"])]
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is a damaged tekken.json: {type(error).__name__}: {error}") from None
    if count > _MAX_SPECIAL or any(len(token) > _MAX_TOKEN_BYTES for token in tokens):
        raise ConfigError(
            f"{path} has more than {_MAX_SPECIAL} special tokens or a token of more than {_MAX_TOKEN_BYTES} bytes"
        )
    if not len(named) <= count <= size <= count + len(tokens):
        raise ConfigError(
            f"{path} has {len(tokens)} tokens and {len(named)} special tokens, "
            f"but names a vocabulary of {size} with {count} special tokens"
        )
    special = dict(enumerate(chain(named, (f"<SPECIAL_{i}>" for i in range(len(named), count)))))
    return from_ranks({token: count + i for i, token in enumerate(tokens[: size - count])}, pattern, special)


def _by_rank(entries: list[TokenizerJson]) -> list[TokenizerJson]:
    """Sort entries by rank.

    Raises:
        ValueError: the ranks are not 0, 1, 2 ...
    """
    entries = sorted(entries, key=lambda entry: entry["rank"])
    if [entry["rank"] for entry in entries] != list(range(len(entries))):
        raise ValueError("the ranks are not contiguous")
    return entries


def _tiktoken(path: Path, content: bytes) -> TokenizerJson:
    known = TIKTOKEN_FILES.get(hashlib.sha256(content).hexdigest())
    if known is None:
        names = ", ".join(kind.name for kind in TIKTOKEN_FILES.values())
        raise ConfigError(
            f"tokenizer {str(path)!r} is a tiktoken file, which has no pattern that splits text and no special tokens; "
            f"these are known for {names} only; {CONVERSION}"
        )
    try:
        pairs = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise ConfigError(f"{path} is a damaged tiktoken file: {error}") from None
    return from_ranks(ranks, known.pattern, known.special)


def _vocabulary_and_merges(path: Path) -> TokenizerJson:
    merges_file, config = path.with_name("merges.txt"), read_tokenizer_json(path.with_name("tokenizer_config.json"))
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name not in CLASSES:
        raise ConfigError(
            f"tokenizer {str(path)!r} has no pattern that splits text; it is known by the tokenizer_class of "
            f"tokenizer_config.json: {' or '.join(CLASSES)}, not {name}; {CONVERSION}"
        )
    lines = read_tokenizer_file(merges_file).decode(errors="replace").split("\n")
    merges = [tuple(line.rstrip("\r").split(" ")) for line in lines[lines[0].startswith("#version") :] if line.strip()]
    normalizer, splits = CLASSES[name](bool(config.get("add_prefix_space")))
    return _content(read_tokenizer_json(path), merges, splits, {}, normalizer=normalizer, ignore_merges=False)


def _gpt2(add_prefix_space: bool) -> tuple[TokenizerJson | None, list[TokenizerJson]]:
    return None, [_byte_level(add_prefix_space, use_regex=True)]


def _qwen2(add_prefix_space: bool) -> tuple[TokenizerJson | None, list[TokenizerJson]]:
    return {"type": "NFC"}, [_split(QWEN2), _byte_level(add_prefix_space)]


CLASSES = {"GPT2Tokenizer": _gpt2, "Qwen2Tokenizer": _qwen2}


def from_ranks(ranks: dict[bytes, int], pattern: str, special: Mapping[int, str]) -> TokenizerJson:
    """Return the `tokenizer.json` of a tiktoken encoding.

    tiktoken merges the pair of tokens whose concatenation has the lowest rank. So every pair that is a token is a
    merge, in the order of these ranks, as in the converter of transformers.

    Args:
        ranks: ids of the tokens, in the order in which they merge.
        pattern: the regular expression whose matches are encoded separately.
        special: special tokens by id.
    """
    letters = byte_letters()
    vocab = {token.decode("latin-1").translate(letters): i for token, i in ranks.items()}
    if both := vocab.keys() & set(special.values()):
        raise ConfigError(f"the tokenizer has {min(both)!r} as a special and as an ordinary token; {CONVERSION}")
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return _content(vocab, merges, [_split(pattern), _byte_level()], special, ignore_merges=True)


def _content(
    vocab: Mapping[str, int],
    merges: list[Any],
    splits: list[TokenizerJson],
    special: Mapping[int, str],
    *,
    normalizer: TokenizerJson | None = None,
    ignore_merges: bool,
) -> TokenizerJson:
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
        "vocab": {**vocab, **{text: i for i, text in special.items()}}, "merges": merges,
    }  # fmt: skip
    added = [added_token(i, text, special=True) for i, text in sorted(special.items())]
    split = {"type": "Sequence", "pretokenizers": splits}
    return tokenizer_json(model, added, normalizer, split, _byte_level())


def _split(pattern: str) -> TokenizerJson:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(add_prefix_space: bool = False, use_regex: bool = False) -> TokenizerJson:
    return {
        "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": False, "use_regex": use_regex
    }  # fmt: skip


def byte_letters() -> dict[int, int]:
    """Return the character that stands for each byte, as GPT-2 has it: itself if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: byte for byte in printable} | {byte: 0x100 + i for i, byte in enumerate(others)}
