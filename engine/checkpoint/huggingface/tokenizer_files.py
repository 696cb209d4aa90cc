"""Writes tokenizer files that `transformers` loads offline and that give the same ids.

A tokenizer that is not a `tokenizer.json` is converted to one. Alternative considered: the files and the class of the
original, which give other ids by rules of each class, and which `transformers` reads only with further packages.
"""

from collections.abc import Mapping
from pathlib import Path

from engine.checkpoint.huggingface.files import Json, read_json, write_json
from engine.checkpoint.storage import Storage
from engine.data.tokenizers.byte import BYTES_END
from engine.data.tokenizers.definition import added_token, bos_processor, tokenizer_json
from engine.data.tokenizers.files import named_tokens
from engine.data.tokenizers.huggingface import HuggingFaceTokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.data.tokenizers.sentencepiece import SentencePieceTokenizer
from engine.data.tokenizers.sentencepiece_json import sentencepiece_json
from engine.errors import CheckpointError, ConfigError

PLAIN_CLASS, TOKENIZER_CONFIG = "PreTrainedTokenizerFast", "tokenizer_config.json"


def write_tokenizer(files: Storage, target: Path, tokenizer_dir: Path | None, tokenizer: Tokenizer) -> None:
    """Copy the run's tokenizer files into `target`, and create the missing files that `transformers` needs.

    Args:
        tokenizer_dir: the checkpoint's tokenizer directory; None for a tokenizer without files (bytes).

    Raises:
        CheckpointError: an unknown kind of tokenizer, or a model that Hugging Face's tokenizers cannot express.
    """
    sources = sorted(tokenizer_dir.iterdir()) if tokenizer_dir else []
    if isinstance(tokenizer, HuggingFaceTokenizer):
        converted = {"added_tokens.json", *(file.name for file in tokenizer.built_from)} if tokenizer.built_from else {}
        sources = [source for source in sources if source.name not in converted]
    for source in sources:
        sentencepiece = tokenizer.kind == "sentencepiece" and source.name == tokenizer.files[0].name
        path = target / ("tokenizer.model" if sentencepiece else source.name)
        if (
            source.name == TOKENIZER_CONFIG
            and (plain := _plain_config(config := read_json(source), tokenizer)) != config
        ):
            write_json(files, path, plain)
        else:
            files.copy(source, path)
    missing = {"tokenizer.json", TOKENIZER_CONFIG} - {source.name for source in sources}
    for name, content in _made_for_transformers(tokenizer).items() if missing else ():
        if name == "tokenizer.json" and tokenizer.adds_bos:
            content["post_processor"] = bos_processor(_text_ends(tokenizer)["bos_token"], tokenizer.bos_id or 0)
        if name in missing:
            write_json(files, target / name, content)


def _plain_config(config: Json, tokenizer: Tokenizer) -> Json:
    """Return a `tokenizer_config.json` under which transformers reads `tokenizer.json` as it is.

    A model's own class, such as `LlamaTokenizer`, rebuilds the tokenizer by rules of its own; so does a missing class,
    in favor of the model's. Beginning and end of text are named if no file names them. `split_special_tokens` would
    read special tokens as text. transformers 5 writes a list of `extra_special_tokens`, for which 4 expects a table.
    """
    named = {**_text_ends(tokenizer), **named_tokens(tokenizer.files[0])[0]}
    ends = {role: named[role] for role in ("bos_token", "eos_token") if role in named and config.get(role) is None}
    dropped = ("auto_map", "legacy", "from_slow", "split_special_tokens")
    kept = {key: value for key, value in config.items() if key not in dropped}
    if isinstance(extra := kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = [*(kept.get("additional_special_tokens") or ()), *extra]
        del kept["extra_special_tokens"]
    return kept | ends | {"tokenizer_class": PLAIN_CLASS}


def _text_ends(tokenizer: Tokenizer) -> dict[str, str]:
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id}
    return {role: texts[i] for role, i in ends.items() if i in texts}


def _made_for_transformers(tokenizer: Tokenizer) -> dict[str, Json]:
    """Return file contents by name; no `tokenizer.json` for a tokenizer that was loaded from one.

    Raises:
        CheckpointError: an unknown kind of tokenizer, or a model that Hugging Face's tokenizers cannot express.
    """
    if tokenizer.kind == "huggingface":
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        built = {"tokenizer.json": tokenizer.to_json()} if tokenizer.built_from else {}
        return {TOKENIZER_CONFIG: tokenizer_config(_text_ends(tokenizer)), **built}
    if tokenizer.kind == "byte":
        pair = bytes_tokenizer()
    elif tokenizer.kind == "sentencepiece":
        assert isinstance(tokenizer, SentencePieceTokenizer)
        pair = sentencepiece_tokenizer(tokenizer.files[0].read_bytes(), tokenizer.prefix_parts)
    else:
        raise CheckpointError(
            f"a tokenizer of kind {tokenizer.kind!r} cannot be exported; expected byte, huggingface or sentencepiece"
        )
    return dict(zip(("tokenizer.json", TOKENIZER_CONFIG), pair, strict=True))


def bytes_tokenizer() -> tuple[Json, Json]:
    """Return `tokenizer.json` and `tokenizer_config.json` of the byte tokenizer: no merges, only byte fallback."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    model: Json = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": None, "byte_fallback": True}
    added = [added_token(256, BYTES_END, special=True)]
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return tokenizer_json(model, added, None, None, decoder), tokenizer_config({"eos_token": BYTES_END})


def sentencepiece_tokenizer(content: bytes, prefix_parts: bool | None = None) -> tuple[Json, Json]:
    """Return `tokenizer.json` and `tokenizer_config.json` of a SentencePiece model; see `sentencepiece_json`.

    Raises:
        CheckpointError: a model that Hugging Face's tokenizers cannot express.
    """
    try:
        tokenizer, special = sentencepiece_json(content, prefix_parts)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return tokenizer, tokenizer_config(special)


def tokenizer_config(special: Mapping[str, str]) -> Json:
    """Return a `tokenizer_config.json`; `special` maps variables such as `eos_token` to the texts of special tokens."""
    return {"tokenizer_class": PLAIN_CLASS, "clean_up_tokenization_spaces": False, **special}
