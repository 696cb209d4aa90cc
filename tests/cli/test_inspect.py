"""The program that looks into a dataset: counts, text, samples, verification and its exit code."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from engine.cli import inspect
from engine.config.schema import DatasetConfig
from engine.data import inspection
from engine.data.samples.pretrain import PretrainDataset
from engine.data.storage import format as storage_format
from engine.data.storage.info import DatasetInfo
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError, DataError, DataFormatError
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece, write_chatml_tokenizer

PROGRAM = Path(__file__).parents[2] / "tools" / "inspect_data.py"
TEXTS = ["first document", "zwölf", "", "the last one\x1b[31m"]


def main(*arguments: object) -> None:
    """The program in this process."""
    inspect.main([str(argument) for argument in arguments])


@pytest.fixture
def prefix(tmp_path):
    """TEXTS as bytes, each ended by id 256: lengths 15, 7, 1 and 18."""
    info = DatasetInfo(tokenizer_kind="byte", tokenizer_hash=load_tokenizer("byte").hash, vocab_size=257, eod_id=256)
    with IndexedDatasetWriter(tmp_path / "set", np.uint16, info) as writer:
        for text in TEXTS:
            writer.add_document([*text.encode(), 256])
    return tmp_path / "set"


def test_counts_and_verification(prefix, capsys):
    main(prefix, "--verify")
    out, err = capsys.readouterr()
    assert "4 in 4 sequences" in out
    assert "41 as uint16" in out
    assert "min 1, median 7, mean 10.2, max 18" in out
    assert "byte, 257 ids, end of document 256" in out
    assert "every pointer; all 41 token ids are below 257" in out
    assert "100.0%" in err and "MB/s" in err and "ETA" in err


def test_text_is_shown_and_cannot_command_the_terminal(prefix, capsys):
    main(prefix, "--head", 2, "--document", 3)
    out, _ = capsys.readouterr()
    assert "document 0: 15 tokens\nfirst document\n" in out
    assert "document 1: 7 tokens\nzwölf\n" in out
    assert "document 3: 18 tokens\nthe last one\\x1b[31m\n" in out


def test_without_a_tokenizer_ids_are_shown(prefix, capsys):
    prefix.with_suffix(".json").unlink()
    main(prefix, "--document", 1, "--seal", "--verify")
    out, _ = capsys.readouterr()
    assert f"document 1: 7 tokens\n{' '.join(map(str, [*TEXTS[1].encode(), 256]))}\n" in out
    assert "not recorded" in out
    assert "give --vocab-size or --tokenizer" in out
    main(prefix, "--document", 1, "--tokenizer", "byte")
    assert "zwölf" in capsys.readouterr().out


def test_a_sample_is_the_one_that_a_run_reads(prefix, capsys):
    main(prefix, "--sample", 9, "--seq-length", 12, "--seed", 5, "--split", "1,0,0", "--json")
    shown = orjson.loads(capsys.readouterr().out)["sample"]
    data = PretrainDataset([DatasetConfig(path=prefix)], (1, 0, 0), "train", 12, 5)
    expected, here = data.sample(9), data.where(9)
    ids = [i for piece in shown["pieces"] for i in piece["ids"]]
    assert [*ids, shown["last_label"]] == [*expected.tokens.tolist(), expected.labels[-1]]
    assert shown["boundaries"] == expected.boundaries.tolist()
    assert np.cumsum([piece["num_tokens"] for piece in shown["pieces"]]).tolist() == [*shown["boundaries"], 12]
    assert (shown["first_token"], shown["epoch"]) == (here.start, here.epoch)
    whole = IndexedDataset(prefix)
    for piece in shown["pieces"]:
        start = whole.document_start(piece["document"]) + piece["offset"]
        assert whole.tokens(start, piece["num_tokens"]).tolist() == piece["ids"]
        assert start + piece["num_tokens"] <= whole.document_start(piece["document"] + 1)
    assert all(piece["offset"] == 0 for piece in shown["pieces"][1:])


def test_a_sample_in_words(prefix, capsys):
    main(prefix, "--sample", 0, "--seq-length", 20, "--split", "1,0,0")
    out, _ = capsys.readouterr()
    assert "sample 0" in out and "epoch 0, number 0 of it" in out and "documents start inside at: " in out


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["--sample", 1], ConfigError, "--sample needs --seq-length"),
        (["--sample", -1, "--seq-length", 4], ConfigError, "--sample -1: expected at least 0"),
        (["--head", -1], ConfigError, "--head -1: expected at least 0"),
        (["--seq-length", 0, "--sample", 1], ConfigError, "--seq-length 0: expected at least 1"),
        (["--vocab-size", 0, "--verify"], ConfigError, "--vocab-size 0: expected at least 1"),
        (["--document", 4], ConfigError, "^no document 4 in .*: it has 4 documents, counted from 0$"),
        (["--verify", "--vocab-size", 120], DataFormatError, r"set\.bin: tokens\[14\] = 256; expected 0 \.\. 119"),
        (["--sample", 1, "--seq-length", 99], DataError, "seq_length = 99"),
    ],
)
def test_bad_input(prefix, arguments, error, message):
    with pytest.raises(error, match=message):
        main(prefix, *arguments)


def test_the_tokenizer_of_other_data_is_refused(prefix):
    text = prefix.with_suffix(".json").read_text()
    prefix.with_suffix(".json").write_text(text.replace(load_tokenizer("byte").hash, "another"))
    main(prefix, "--seal")
    with pytest.raises(DataError, match=r"hash another; tokenizer byte has"):
        main(prefix, "--tokenizer", "byte")


def test_the_exit_code_says_bad_data_and_works_from_anywhere(prefix, tmp_path):
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[20:22] = struct.pack("<H", 300)
    prefix.with_suffix(".bin").write_bytes(content)
    ran = subprocess.run([sys.executable, PROGRAM, "set", "--verify"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 65
    assert "set.bin: tokens[10] = 300; expected 0 .. 256" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_summary_of_one_file_with_one_document(tmp_path, capsys):
    sources = [{"path": "a.txt", "bytes": 2}]
    info = DatasetInfo(
        tokenizer_kind="byte", tokenizer_hash="h", vocab_size=257, eod_id=256, sources=sources, skipped=1
    )
    with IndexedDatasetWriter(tmp_path / "one", np.uint16, info) as writer:
        writer.add_document([97, 256])
    main(tmp_path / "one")
    out = capsys.readouterr().out
    assert "1 in 1 sequence\n" in out and "1 source, 2 bytes\n" in out and out.count(" 1 line\n") == 1


def test_an_empty_dataset(tmp_path, capsys):
    with IndexedDatasetWriter(tmp_path / "empty", np.uint16):
        pass
    main(tmp_path / "empty", "--verify", "--head", 3)
    assert "0 in 0 sequences" in capsys.readouterr().out


@pytest.mark.parametrize("bits", [2, 20])
def test_length_statistics_are_exact(tmp_path, monkeypatch, bits):
    monkeypatch.setattr(inspection, "LOW_BITS", bits)  # lengths of up to 2 * bits bits are told apart
    monkeypatch.setattr(storage_format, "CHUNK", 7)
    for count in (1, 2, 3, 30, 31):
        lengths = np.random.default_rng(count).integers(0, 16, count)
        with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
            writer.add_documents(np.zeros(lengths.sum(), np.int64), lengths)
        statistics = inspection.length_statistics(IndexedDataset(tmp_path / "set"))
        assert statistics == {
            "min": lengths.min(),
            "median": np.sort(lengths)[(count - 1) // 2],
            "mean": lengths.mean(),
            "max": lengths.max(),
        }


def test_ids_outside_the_vocabulary_are_shown_as_numbers():
    tokenizer = load_tokenizer("byte")
    assert inspection.decode([104, 105, 999, 33], tokenizer) == "hi<id 999>!"
    assert inspection.decode([], tokenizer) == ""


def test_a_sparse_file_is_counted_without_reading_it(tmp_path, capsys):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([0])
    length = 2**31 - 1
    index = bytearray((tmp_path / "set.idx").read_bytes())
    index[34:38] = struct.pack("<i", length)
    (tmp_path / "set.idx").write_bytes(index)
    os.truncate(tmp_path / "set.bin", 2 * length)
    (tmp_path / "set.checksums").unlink()
    main(tmp_path / "set")
    assert f"{length:,} as uint16" in capsys.readouterr().out


@pytest.fixture
def chats(tmp_path):
    """Two conversations in ChatML, the answers targets, and ids that are nobody's text; beside the tokenizer `tok`."""
    tokenizer = load_tokenizer(write_chatml_tokenizer(tmp_path / "tok"))
    info = DatasetInfo(tokenizer_kind="huggingface", tokenizer_hash=tokenizer.hash, vocab_size=300, eod_id=0)
    with IndexedDatasetWriter(tmp_path / "chats", np.uint16, info, masked=True) as writer:
        for question, answer in (("hi", "höllo\x1b[31m"), ("who?", "me")):
            asked = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
            said = tokenizer.encode(f"{answer}<|im_end|>")
            writer.add_document([*asked, *said], [0] * len(asked) + [1] * len(said))
        writer.add_document([299, 5, 0], [0, 1, 1])
    return tmp_path / "chats"


ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_with_its_targets(chats, capsys):
    for flag in ("--sample", "--document"):
        main(chats, "--tokenizer", chats.parent / "tok", flag, 0)
        out, _ = capsys.readouterr()
        assert f"conversation 0: 33 tokens, 12 target tokens\n{ASKED}«höllo\\x1b[31m<|im_end|>»\n" in out
        assert "target tokens           17, 27.4%" in out
    main(chats, "--tokenizer", chats.parent / "tok", "--head", 3)
    out, _ = capsys.readouterr()
    assert "«me<|im_end|>»" in out
    assert "conversation 2: 3 tokens, 2 target tokens\n<id 299>«" in out and "<|endoftext|>»" in out


def test_a_conversation_in_colors(chats, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = (chats, "--tokenizer", chats.parent / "tok", "--sample", 1)
    main(*arguments)
    out, _ = capsys.readouterr()
    assert "\x1b[1;32mme<|im_end|>\x1b[0m" in out and "«" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    main(*arguments)
    out, _ = capsys.readouterr()
    assert "«me<|im_end|>»" in out and "32m" not in out


def test_a_conversation_without_a_tokenizer(chats, capsys):
    main(chats, "--document", 2)
    assert "\n299 «5 0»" in capsys.readouterr().out


def test_a_conversation_as_json(chats, capsys):
    main(chats, "--tokenizer", chats.parent / "tok", "--sample", 0, "--json")
    report = orjson.loads(capsys.readouterr().out)
    (shown,) = report["document"]
    assert report["target_tokens"] == 17
    assert (shown["document"], shown["num_tokens"], shown["num_targets"]) == (0, 33, 12)
    assert [(run["is_target"], run["text"]) for run in shown["runs"]] == [
        (False, ASKED),
        (True, "höllo\x1b[31m<|im_end|>"),
    ]
    assert [len(run["ids"]) for run in shown["runs"]] == [21, 12]


def test_long_conversations_are_cut_for_reading(tmp_path, capsys):
    with IndexedDatasetWriter(tmp_path / "long", np.uint16, masked=True) as writer:
        writer.add_document([65] * 5000, [0, 1] * 2500)
    main(tmp_path / "long", "--tokenizer", "byte", "--sample", 0)
    out, _ = capsys.readouterr()
    assert "conversation 0: 5,000 tokens, 2,500 target tokens, the first 4,096\n" + "A«A»" * 2048 + "\n" in out


def test_masks_are_verified(chats, capsys):
    main(chats, "--verify")
    assert "the mask has a 0 or 1 for each" in capsys.readouterr().out
    mask = chats.with_name("chats.mask.bin")
    content = mask.read_bytes()
    mask.write_bytes(content[:3] + b"\x07" + content[4:])
    with pytest.raises(DataFormatError, match=r"chats\.mask\.bin: mask\[3\] = 7; expected 0 or 1"):
        main(chats, "--verify")
    mask.write_bytes(content[:-1])
    with pytest.raises(DataFormatError, match=r"chats\.mask\.bin"):
        main(chats, "--verify")


def test_samples_that_are_conversations_need_no_length(chats):
    with pytest.raises(ConfigError, match=r"--seq-length does not apply to .*chats"):
        main(chats, "--sample", 0, "--seq-length", 8)
    with pytest.raises(ConfigError, match=r"^no conversation 3 in .*chats: it has 3 conversations, counted from 0$"):
        main(chats, "--sample", 3)


def test_a_fine_tuning_dataset_has_conversations(chats, capsys):
    main(chats, "--tokenizer", chats.parent / "tok")
    out = capsys.readouterr().out
    assert "conversations           3 in 3 sequences\n" in out and "tokens per conversation min 3, " in out
    assert "document" not in out.replace("end of document", "")  # no other one


def test_every_id_of_a_conversation_is_seen():
    tokenizer = load_tokenizer("byte")
    euro = list("€".encode())
    texts = inspection.token_texts([104, *euro, 256, 300, 105], tokenizer)
    assert texts[0] == "h" and "".join(texts[1:4]) == "€" and texts[5:] == ["<id 300>", "i"]
    assert texts[4] in (*tokenizer.special_tokens, "<id 256>")
    assert inspection.token_texts([euro[0]], tokenizer) == ["\ufffd"]


def test_a_space_at_the_start_is_shown(tmp_path):
    model = train_sentencepiece(standard_library_texts(50_000), vocab_size=500)
    (tmp_path / "t.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    space = tokenizer.encode("\n")[0]
    assert tokenizer.decode([space]) == ""
    assert inspection.token_texts([1, space, *tokenizer.encode("\n")[1:], 2], tokenizer) == ["<s>", " ", "\n", "</s>"]
