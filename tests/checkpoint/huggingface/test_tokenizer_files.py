import io
import json
import random
import string
from pathlib import Path

import pytest

from engine.checkpoint.huggingface.tokenizer_files import bytes_tokenizer, sentencepiece_tokenizer, write_tokenizer
from engine.checkpoint.storage import Storage
from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.data.tokenizers.sentencepiece import SentencePieceTokenizer
from engine.errors import CheckpointError

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
MODELS = {
    "bpe": {"model_type": "bpe", **PLAIN},
    "bpe_normalized": {"model_type": "bpe", "byte_fallback": True},
    "bpe_with_unknowns": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "bpe_with_symbols": {"model_type": "bpe", "user_defined_symbols": ["<|im_start|>", "\n\n", "<|im"], **PLAIN},
    "bpe_without_prefix": {"model_type": "bpe", "add_dummy_prefix": False, **PLAIN},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
}
CORPUS = [
    line for path in sorted(Path(string.__file__).parent.glob("*.py"))[:12] for line in path.open(errors="ignore")
]


@pytest.fixture(scope="session", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=600, minloglevel=2, hard_vocab_limit=False,
        **MODELS[request.param],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / f"{request.param}.model"
    path.write_bytes(written.getvalue())
    return path


def texts() -> list[str]:
    rng = random.Random(0)
    parts = ["<|im_start|>", "\n\n", "aaaa", "    ", "the ", "self.", " ", "return", "é", "漢字", "🎉", "\t", "0123"]
    made = ["".join(rng.choice(parts) for _ in range(rng.randint(1, 20))) for _ in range(200)]
    odd = [
        "",
        " ",
        "  ",
        " lead",
        "trail  ",
        "a  b",
        "\n\n\n  a\tb",
        "naïve ﬁ ½",
        "x\x00y",
        "def f(x):\n    return x\n",
    ]
    return [*odd, *made, "".join(CORPUS[:40])]


def as_transformers_loads_it(directory: Path, pair: tuple[dict, dict]):  # type: ignore[no-untyped-def, type-arg]
    transformers = pytest.importorskip("transformers")
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), pair, strict=True):
        (directory / name).write_text(json.dumps(content))
    (directory / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return transformers.AutoTokenizer.from_pretrained(directory)


def assert_same(ours: Tokenizer, theirs) -> None:  # type: ignore[no-untyped-def]
    for text in texts():
        assert theirs.encode(text) == list(ours.encode(text)), text


def test_sentencepiece_ids_are_the_same(model: Path, tmp_path: Path) -> None:
    ours = SentencePieceTokenizer(model, fast=False)
    theirs = as_transformers_loads_it(tmp_path, sentencepiece_tokenizer(model.read_bytes()))
    assert_same(ours, theirs)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eod_id, None)
    assert len(theirs) == ours.vocab_size
    if "unknowns" not in model.name:  # what is unknown has no text
        for text in texts():
            assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), text


def test_byte_ids_are_the_same(tmp_path: Path) -> None:
    ours = ByteTokenizer()
    theirs = as_transformers_loads_it(tmp_path, bytes_tokenizer())
    assert_same(ours, theirs)
    assert theirs.eos_token_id == ours.eod_id
    assert len(theirs) == ours.vocab_size
    assert theirs.decode(ours.encode("漢 é\n")) == "漢 é\n"


def test_a_model_of_words_is_refused() -> None:
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9), model_writer=written, model_type="char", vocab_size=8, minloglevel=2
    )
    with pytest.raises(CheckpointError, match="neither a BPE nor a Unigram"):
        sentencepiece_tokenizer(written.getvalue())


def test_an_unknown_kind_of_tokenizer_is_an_error(tmp_path):
    class OtherTokenizer(ByteTokenizer):
        kind = "other"

    with pytest.raises(CheckpointError, match="kind 'other' cannot be exported; expected byte, huggingface or sent"):
        write_tokenizer(Storage(), tmp_path, None, OtherTokenizer())
