"""The program: its flags, what it prints, its exit codes, and that it never leaves half a dataset."""

import gzip
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
import yaml

from engine.cli import preprocess
from engine.config.schema import DatasetConfig
from engine.data.samples.pretrain import PretrainDataset
from engine.data.storage.reader import IndexedDataset
from engine.data.tokenizers import fast_sentencepiece
from engine.data.tokenizers.definition import bos_processor
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError, DataError, StorageError
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece, write_chatml_tokenizer

PROGRAM = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture
def main():
    """The program's `main`, to be called in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: preprocess.main([str(argument) for argument in arguments])
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("a.jsonl"), ["first", "second text", "third"])
    return tmp_path


def write_lines(path, texts):
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))


def start(*arguments, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, PROGRAM, *map(str, arguments)], **pipes, text=True, **options)


def finish(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


BYTE = ("--tokenizer-type", "ByteTokenizer")


def test_from_a_clean_process(folder):
    code, out, err = finish("--input", "a.jsonl", "--output-prefix", "out/a", *BYTE, "--append-eod", "--workers", "2")
    assert (code, err) == (0, "")
    assert "done       3 documents, 24 tokens" in out
    assert "21 bytes" not in out and "0.88 bytes per token" in out
    assert "out/a_text_document.bin .idx .json" in out
    assert f"next       python {PROGRAM.with_name('inspect_data.py')} out/a_text_document" in out
    assert bytes(IndexedDataset("out/a_text_document").tokens(0, 5).astype("uint8")) == b"first"


def test_it_does_not_load_torch(folder):
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, PROGRAM, "--input", "a.jsonl", "--output-prefix", "a", *BYTE]
    subprocess.run(command, check=True, timeout=60, capture_output=True)


def test_every_kind_of_input_and_two_keys(folder, main):
    line = b'{"text": "t", "title": "ab"}\n'
    Path("b.jsonl.gz").write_bytes(gzip.compress(line * 2))
    Path("c.json").write_bytes(line)
    arguments = ("--input", "b.jsonl.gz", "c.json", "--output-prefix", "x", "--json-keys", "text", "title")
    main(*arguments, *BYTE, "--workers", 1)
    assert IndexedDataset("x_text_document").num_documents == 3
    assert IndexedDataset("x_title_document").num_tokens == 6
    Path("corpus").mkdir()
    Path("corpus/d.txt").write_text("a text file")
    main("--input", "a.jsonl", "corpus", "--output-prefix", "y", "--tokenizer", "byte", "--workers", 1)
    assert IndexedDataset("y_text_document").num_documents == 4


def test_progress(folder, main, capsys):
    for name in "bc":
        write_lines(Path(f"{name}.jsonl"), ["text"] * 10)
    arguments = ("--input", "b.jsonl", "c.jsonl", "--output-prefix", "x", *BYTE, "--workers", 1)
    main(*arguments, "--log-interval", 10)
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert len(lines) == 2
    assert re.fullmatch(r" 50\.0%  10 documents  0\.0 MB  [\d.]+ MB/s  40 tokens  [\d,]+ tokens/s  ETA 0:00", lines[0])
    main(*arguments, "--log-interval", 1000, "--overwrite")
    assert "ETA" not in capsys.readouterr().out


@pytest.fixture(scope="session")
def model():
    return train_sentencepiece(standard_library_texts(50_000), vocab_size=500)


def test_types_and_models(folder, main, model, capsys):
    Path("t.model").write_bytes(model)
    for number, name in enumerate(("SentencePieceTokenizer", "Llama2Tokenizer", "sentencepiece")):
        arguments = ("--input", "a.jsonl", "--output-prefix", number, "--workers", 1, "--tokenizer-type", name)
        main(*arguments, "--tokenizer-model", "t.model")
    assert "sentencepiece: 500 ids, end of document 2" in capsys.readouterr().out
    tokenizer = load_tokenizer("t.model")
    dataset = IndexedDataset("0_text_document")
    assert dataset.tokens(0, dataset.document_start(1)).tolist() == tokenizer.encode("first")
    with pytest.raises(ConfigError, match=r"HuggingFaceTokenizer needs a huggingface model, but t\.model is sent"):
        main(*arguments[:-1], "HuggingFaceTokenizer", "--tokenizer-model", "t.model", "--overwrite")


def test_a_wrong_encoder_is_replaced_before_anything_is_written(folder, main, model, capsys, monkeypatch):
    Path("t.model").write_bytes(model)
    monkeypatch.setattr(fast_sentencepiece, "CHECK_INTERVAL", 2)
    monkeypatch.setattr(fast_sentencepiece.FastSentencePiece, "_self_test", lambda self, pieces: None)
    right = fast_sentencepiece.merges
    monkeypatch.setattr(fast_sentencepiece, "merges", lambda scores: right(scores)[::-1])
    texts = list(standard_library_texts(20_000))[:20]
    write_lines(Path("a.jsonl"), texts)
    for workers in (1, 2):
        arguments = ("--input", "a.jsonl", "--output-prefix", "x", "--tokenizer-model", "t.model", "--overwrite")
        main(*arguments, "--workers", workers)
        output = capsys.readouterr()
        assert "gigatoken and SentencePiece give different ids" in output.err
        assert "encoder    sentencepiece" in output.out
        tokenizer = load_tokenizer("t.model", fast=False)
        expected = [i for text in texts for i in tokenizer.encode(text)]
        dataset = IndexedDataset("x_text_document")
        assert dataset.tokens(0, dataset.num_tokens).tolist() == expected


def test_bad_lines_are_skipped_or_fatal(folder, main, capsys):
    Path("a.jsonl").write_bytes(b'{"text": "a"}\n' + b"bad\n" * 8)
    main("--input", "a.jsonl", "--output-prefix", "out/x", *BYTE)
    output = capsys.readouterr()
    assert output.err.splitlines()[0].startswith("warning: without --append-eod")
    assert output.err.splitlines()[1].startswith("skipped: a.jsonl:2: not JSON")
    assert len(output.err.splitlines()) == 2
    assert "8 lines skipped: out/x.rejects.jsonl" in output.out
    assert len(Path("out/x.rejects.jsonl").read_bytes().splitlines()) == 8
    code, _, err = finish("--input", "a.jsonl", "--output-prefix", "fatal/x", *BYTE, "--on-bad-line", "fail")
    assert code == 65
    assert "error: a.jsonl:2: not JSON" in err and "'bad'" in err
    assert files(folder / "fatal") == []


def test_a_wrong_key_is_noticed_early(folder, main, capsys):
    write_lines(Path("a.jsonl"), ["text"] * 100_000)
    with pytest.raises(DataError, match=r"lines and no document; a\.jsonl:1: no key 'body'; it has 'text'"):
        main("--input", "a.jsonl", "--output-prefix", "out/x", *BYTE, "--json-keys", "body", "--workers", 1)
    assert "rejects.jsonl" not in capsys.readouterr().err
    assert files(folder / "out") == []


def test_a_prefix_below_a_file(folder, main):
    for prefix in ("a.jsonl/x", "/dev/full/x"):
        with pytest.raises(StorageError, match="cannot write the dataset"):
            main("--input", "a.jsonl", "--output-prefix", prefix, *BYTE, "--workers", 1)
    with pytest.raises(ConfigError, match="--output-prefix is empty"):
        main("--input", "a.jsonl", "--output-prefix", "", *BYTE)
    with pytest.raises(ConfigError, match=r"--output-prefix out/ is a directory; expected .*, as in out/corpus"):
        main("--input", "a.jsonl", "--output-prefix", "out/", *BYTE)


def test_existing_output_is_not_replaced_unasked(folder, main):
    arguments = ("--input", "a.jsonl", "--output-prefix", "x", *BYTE)
    main(*arguments)
    before = {name: Path(name).read_bytes() for name in files(folder)}
    with pytest.raises(ConfigError, match=r"x_text_document\.bin exists; .* --overwrite"):
        main(*arguments)
    assert {name: Path(name).read_bytes() for name in files(folder)} == before
    main(*arguments, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--input", "gone.jsonl", *BYTE), 64, "error: input: no such file or directory: gone.jsonl"),
        (
            ("--input", "a.jsonl"),
            64,
            "error: --tokenizer-model is missing: a tokenizer's file, a directory that contains one, or `byte`",
        ),
        (("--input", "a.jsonl", "--tokenizer-model", "gone.model"), 64, "'gone.model': no such file"),
        (("--input", "a.jsonl", "--tokenizer-type", "GPT2BPETokenizer"), 64, "GPT2BPETokenizer is unknown; expected"),
        (("--input", "a.jsonl", *BYTE, "--workers", "0"), 64, "--workers 0: expected at least 1"),
        (("--input", "a.jsonl", *BYTE, "--json-keys", "a", "a"), 64, "names a key twice: a, a"),
        (("--input", "a.jsonl", *BYTE, "--json-keys", "body"), 65, "error: not a single token for key 'body'"),
        (("--input", "empty.jsonl", *BYTE), 65, "error: not a single token for key 'text' in empty.jsonl"),
    ],
)
def test_errors(folder, arguments, code, message):
    Path("empty.jsonl").write_bytes(b"")
    seen, _, err = finish(*arguments, "--output-prefix", "out/x")
    assert (seen, "Traceback" in err) == (code, False)
    assert message in err
    assert not Path("out").exists() or files(folder / "out") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_no_space(folder, workers):
    write_lines(Path("a.jsonl"), ["text " * 1000] * 1000)
    code, _, err = finish(
        "--input", "a.jsonl", "--output-prefix", "out/x", *BYTE, "--workers", workers,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
    )  # fmt: skip
    assert (code, "Traceback" in err) == (74, False)
    assert "error: cannot write the dataset" in err
    assert files(folder / "out") == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_by_a_signal(folder, sent, code, workers):
    """In the middle of the work: the program has written and waits for more input, which never comes."""
    os.mkfifo("pipe.jsonl")
    process = start("--input", "pipe.jsonl", "--output-prefix", "out/x", *BYTE, "--workers", workers)
    with open("pipe.jsonl", "wb") as pipe:
        for _ in range(20):
            pipe.write(orjson.dumps({"text": "text " * 200_000}) + b"\n")
        pipe.flush()
        end = time.monotonic() + 30
        while not any(partial.stat().st_size for partial in Path("out").glob("x_text_document.bin.*.partial")):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)  # until it waits; between two reads of a pipe, Python would notice only after the second
        process.send_signal(sent)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.splitlines()[1:] in (["terminated"], ["interrupted"])
    assert files(folder / "out") == []


def test_help_names_every_flag(folder):
    code, out, _ = finish("--help")
    assert code == 0
    for flag in ("--input", "--json-keys", "--append-eod", "--workers", "--log-interval", "--on-bad-line"):
        assert flag in out
    assert ".txt, .md, .rst and .py (one document per file)" in out


def test_the_command_of_the_smallest_configuration(main, tmp_path, monkeypatch):
    """As its comment gives it; the data have to do for training and evaluation."""
    monkeypatch.chdir(PROGRAM.parents[1])
    text = Path("examples/configs/tiny.yaml").read_text()
    (command,) = re.findall(r"^# +triaxis preprocess (.*)$", text, re.MULTILINE)
    arguments = shlex.split(command)
    assert arguments[-2:] == ["--output-prefix", "data/tiny"]
    main(*arguments[:-1], tmp_path / "tiny", "--workers", 1)
    data = yaml.safe_load(text)["data"]
    prefix = DatasetConfig(path=tmp_path / Path(data["train"][0]["path"]).name)
    for part in ("train", "valid"):
        dataset = PretrainDataset([prefix], data["split"], part, data["seq_length"], 1)
        assert len(dataset.sample(0).tokens) == data["seq_length"]


def test_nothing_of_fine_tuning_is_asked_of_texts(folder, main):
    for flag, value in (("--chat-template", "chatml"), ("--train-on", "all"), ("--max-length", "9")):
        with pytest.raises(ConfigError, match=f"{flag} applies only to --task sft, not to --task pretrain"):
            main("--input", "a.jsonl", "--output-prefix", "x", *BYTE, flag, value)


CHATS = [
    {"messages": [{"role": "user", "content": "q<|im_end|>"}, {"role": "assistant", "content": "answer"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "answer " * 30}]},
    {"messages": [{"role": "critic", "content": "q"}]},
    {"text": "plain"},
]
SFT = ("--task", "sft", "--output-prefix", "out/x", "--chat-template", "chatml")


@pytest.fixture
def chats(folder):
    """CHATS, and a tokenizer with ChatML's tokens in the directory `tok`."""
    Path("chats.jsonl").write_bytes(b"".join(orjson.dumps(chat) + b"\n" for chat in CHATS))
    write_chatml_tokenizer(Path("tok"))
    return folder


def test_conversations_from_a_clean_process(chats):
    arguments = (*SFT, "--input", "chats.jsonl", "--tokenizer-model", "tok", "--workers", "2")
    code, out, err = finish(*arguments, "--max-length", "100")
    assert code == 0
    assert files(chats / "out") == [
        "x.rejects.jsonl",
        *(f"x_sft.{kind}" for kind in ("bin", "checksums", "idx", "json", "mask.bin")),
    ]
    data = IndexedDataset("out/x_sft")
    targets = int(data.mask(0, data.num_tokens).sum())
    for line in (
        "template   chatml",
        "formats    messages 1, sharegpt 1, text 1",
        "turn end   '<|im_end|>' (id 2), a target token",
        f"done       3 conversations, {data.num_tokens} tokens in 0:0",
        f"{targets} target tokens, {targets / data.num_tokens:.1%}",
        "tokens per document: median 29, longest 100",
        "1 rejected: unknown role",
        "1 too long, truncated to max_length",
        "1 of 4 records rejected, which are in out/x.rejects.jsonl:",
        f"next       python {PROGRAM.with_name('inspect_data.py')} out/x_sft --tokenizer tok --sample 0",
    ):
        assert line in out
    assert "skipped: chats.jsonl:3: unknown role: messages[0] has role 'critic'" in err
    assert "warning: conversations whose text contains a special token, which is encoded as such: 1" in err
    command = re.search(r"^next +python (.*)$", out, re.MULTILINE)
    shown = subprocess.run([sys.executable, *shlex.split(command[1])], capture_output=True, text=True)
    assert "<|im_start|>assistant\n«answer<|im_end|>»" in shown.stdout


def test_several_files_of_conversations(chats, main, capsys):
    Path("more").mkdir()
    Path("more/b.jsonl").write_bytes(orjson.dumps({"instruction": "q", "output": "a"}))
    main(*SFT, "--input", "chats.jsonl", "more", "--tokenizer-model", "tok", "--workers", 1)
    out, _ = capsys.readouterr()
    assert "chats.jsonl: messages 1, sharegpt 1, text 1" in out and "more/b.jsonl: alpaca 1" in out


@pytest.mark.parametrize(("good", "warned"), [(8, True), (9, False)])
def test_what_was_rejected_is_summed_up(chats, main, capsys, good, warned):
    """A line for each of the first reasons, and a warning when more than half were lost."""
    bad = [b"bad", b"{}", b"{}", b"5", b'{"messages": []}', b'{"text": ""}', b'{"input_ids": [1]}', b"bad", b"bad"]
    Path("chats.jsonl").write_bytes(b"\n".join([*bad, *[orjson.dumps(CHATS[0])] * good]))
    main(*SFT, "--input", "chats.jsonl", "--tokenizer-model", "tok", "--workers", 1)
    out, err = capsys.readouterr()
    summary = f"9 of {9 + good} records rejected"
    assert f"           {summary}, which are in out/x.rejects.jsonl:\n           3 rejected: not JSON\n" in out
    quoted = [line.split(":")[2] for line in err.splitlines() if line.startswith("skipped")]
    assert quoted == ["1", "2", "4", "5", "6"]
    assert (f"warning: {summary}, more than half\n" in err) == warned


def test_one_is_not_several(chats, main, capsys):
    Path("chats.jsonl").write_bytes(orjson.dumps(CHATS[0]) + b"\n")
    main(*SFT, "--input", "chats.jsonl", "--tokenizer-model", "tok", "--workers", 1)
    write_lines(Path("a.jsonl"), ["one", ""])
    main("--input", "a.jsonl", "--output-prefix", "x", *BYTE, "--append-eod", "--workers", 1)
    out, err = capsys.readouterr()
    for line in (
        "1 conversation, ",
        "1 document, ",
        "; 1 worker\n",
        "input      1 file, ",
        "1 empty document left out",
    ):
        assert line in out
    assert "rejected" not in out + err


def test_texts_need_no_template(chats, main, capsys):
    arguments = ("--task", "sft", "--output-prefix", "y", "--tokenizer-model", "tok", "--workers", 1)
    main(*arguments, "--input", "a.jsonl")
    out, _ = capsys.readouterr()
    assert "template   none" in out and "turn end" not in out
    with pytest.raises(ConfigError, match="no chat template; name one with --chat-template: chatml"):
        main(*arguments, "--input", "chats.jsonl", "--overwrite")
    assert IndexedDataset("y_sft").num_documents == 3  # the old one is still there


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--append-eod"], ConfigError, "--append-eod applies only to --task pretrain, not to --task sft"),
        (["--json-keys", "text"], ConfigError, "--json-keys applies only to --task pretrain, not to --task sft"),
        (["--encoder", "auto"], ConfigError, "--encoder applies only to --task pretrain, not to --task sft"),
        (["--max-length", 1], ConfigError, "--max-length 1: expected at least 2"),
        (["--on-too-long", "drop"], ConfigError, "--on-too-long drop needs --max-length"),
        (["--chat-template", "gone.jinja"], ConfigError, r"chat template 'gone\.jinja': No such file"),
        (["--chat-template", "llama3"], ConfigError, "templates that work with it: chatml"),
        (["--on-bad-line", "fail"], DataError, r"chats\.jsonl:3: unknown role"),
        (["--max-length", 60, "--on-too-long", "error"], DataError, r"chats\.jsonl:2: 232 tokens, more than .* 60"),
        (["--max-length", 4], DataError, "no targets in .*: 3 rejected: no target when cut; 1 rejected"),
    ],
)
def test_errors_with_conversations(chats, main, arguments, error, message):
    Path("chats.jsonl").write_bytes(b"".join(orjson.dumps(chat) + b"\n" for chat in [*CHATS[:3], CHATS[0]]))
    with pytest.raises(error, match=message):
        main(*SFT, "--input", "chats.jsonl", "--tokenizer-model", "tok", "--workers", 1, *arguments)
    assert not Path("out").exists() or files(chats / "out") == []


def test_existing_conversations_are_not_replaced_unasked(chats, main):
    Path("out").mkdir()
    Path("out/x_sft.mask.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"x_sft\.mask\.bin exists; .* --overwrite"):
        main(*SFT, "--input", "chats.jsonl", "--tokenizer-model", "tok")


def test_a_tokenizer_that_starts_texts_is_said_to(folder, main, capsys):
    """By `transformers`, whose users would give the trained model other ids than it has learned."""
    write_chatml_tokenizer(folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    content = orjson.loads(path.read_bytes())
    names = b'{"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}'
    (folder / "tokenizer" / "tokenizer_config.json").write_bytes(names)
    arguments = ("--input", "a.jsonl", "--tokenizer-model", "tokenizer", "--append-eod", "--workers", 1)
    main(*arguments, "--output-prefix", "plain")
    assert "warning" not in capsys.readouterr().err
    path.write_bytes(orjson.dumps({**content, "post_processor": bos_processor("<|im_start|>", 1)}))
    main(*arguments, "--output-prefix", "without")
    assert "starts every text with '<|im_start|>' (id 1)" in capsys.readouterr().err
    main(*arguments, "--output-prefix", "with", "--prepend-bos")
    assert "warning" not in capsys.readouterr().err
    for prefix, first in (("plain", False), ("without", False), ("with", True)):
        assert (IndexedDataset(folder / f"{prefix}_text_document").tokens(0, 1)[0] == 1) == first


def test_a_second_run_on_the_same_prefix_is_refused_and_the_first_unharmed(folder):
    """In the middle of the first one's work, also with --overwrite."""
    os.mkfifo("pipe.jsonl")
    arguments = ("--output-prefix", "out/x", *BYTE, "--workers", 1)
    first = start("--input", "pipe.jsonl", *arguments)
    with open("pipe.jsonl", "wb") as pipe:
        pipe.write(b'{"text": "from the pipe"}\n')
        pipe.flush()
        end = time.monotonic() + 60
        while not Path("out/x_text_document.lock").exists():
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.01)
        for overwrite in ((), ("--overwrite",)):
            code, _, err = finish("--input", "a.jsonl", *arguments, *overwrite)
            assert code == 64 and f"process {first.pid} on" in err and "out/x" in err
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0 and "1 document" in out, err
    data = IndexedDataset("out/x_text_document")
    data.verify(257)
    assert bytes(data.tokens(0, 13).astype("uint8")) == b"from the pipe"
    assert files(folder / "out") == [f"x_text_document.{kind}" for kind in ("bin", "checksums", "idx", "json")]


def test_standard_input(folder):
    arguments = ("--input", "-", "a.jsonl", "--output-prefix", "out/x", *BYTE, "--workers", 2)
    process = start(*arguments, stdin=subprocess.PIPE)
    _, err = process.communicate('{"text": "piped"}\n' * 2, timeout=60)
    assert process.returncode == 0, err
    data = IndexedDataset("out/x_text_document")
    assert data.num_documents == 5 and bytes(data.tokens(0, 10).astype("uint8")) == b"pipedpiped"
    assert [source.path for source in data.info.sources] == ["-", "a.jsonl"]


def test_files_that_are_not_read_are_told(folder, main, capsys):
    Path("corpus/.ipynb_checkpoints").mkdir(parents=True)
    for name in ("b.jsonl", "c.md", ".ipynb_checkpoints/b-checkpoint.jsonl"):
        write_lines(Path("corpus", name), ["text"])
    main("--input", "corpus", "--output-prefix", "x", *BYTE, "--append-eod", "--workers", 1)
    err = capsys.readouterr().err
    assert err.startswith("warning: corpus: 2 files of 3 not read (1 hidden, 1 .md); of a directory, .jsonl, ")
    assert IndexedDataset("x_text_document").num_documents == 1
