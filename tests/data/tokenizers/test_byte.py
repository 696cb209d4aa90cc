"""The tokenizer of bytes."""

from engine.data.tokenizers.byte import ByteTokenizer
from engine.data.tokenizers.load import load_tokenizer


def test_byte():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id, tokenizer.hash) == (257, 256, None, "byte")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 256, 0xC3]) == "a\ufffd"
    assert tokenizer.files == []


def test_byte_special_tokens():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.special_tokens == {"<|endoftext|>": 256}
    ids, spans = tokenizer.encode_special("aé<|endoftext|>b<|endoftext")
    assert ids == [97, 0xC3, 0xA9, 256, 98, *b"<|endoftext"]
    assert spans[:5] == [(0, 1), (1, 2), (1, 2), (2, 15), (15, 16)]
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")


def test_byte_tokenizers_share_nothing():
    ByteTokenizer().files.append("x")
    assert ByteTokenizer().files == []
