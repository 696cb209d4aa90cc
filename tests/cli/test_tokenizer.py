import json
import subprocess
import sys
from pathlib import Path

from engine.data.tokenizers.load import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools/train_tokenizer.py"


def train(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_text_survives_a_round_trip(tmp_path):
    text = Path(json.__file__).read_text()
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": text}) + "\n")
    done = train("--input", tmp_path / "corpus.jsonl", "--vocab-size", 400, "--output", tmp_path / "new/tok")
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(str(tmp_path / "new/tok.model"))
    assert tokenizer.vocab_size == 400
    for sample in (text, "  a\tb\r\n\n   ", "ünïcödé 漢字 🎉", ""):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new/tok.model"]


def test_what_cannot_be_learnt(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("too little text\n")
    done = train("--input", corpus, "--vocab-size", 50_000, "--output", tmp_path / "tok")
    assert done.returncode == 64
    assert "--vocab-size 50000 is too large for this text; lower it to " in done.stderr
    assert "src/" not in done.stderr
    done = train("--input", corpus, "--vocab-size", 100, "--output", tmp_path / "tok")
    assert "--vocab-size 100 is too small for the bytes and characters of this text; raise it to 2" in done.stderr
    corpus.write_text("\n")
    done = train("--input", corpus, "--vocab-size", 300, "--output", tmp_path / "tok")
    assert done.returncode == 65
    assert "no text to train on" in done.stderr
    assert train("--input", tmp_path / "none", "--vocab-size", 400, "--output", tmp_path / "tok").returncode == 64
    assert not list(tmp_path.glob("tok*"))


def test_bad_lines_and_an_existing_model(tmp_path):
    text = Path(json.__file__).read_text()
    (tmp_path / "corpus.jsonl").write_text("bad\n" * 7 + json.dumps({"text": text}) + "\n")
    arguments = ("--input", tmp_path / "corpus.jsonl", "--vocab-size", 400, "--output", tmp_path / "tok.model")
    done = train(*arguments)
    assert done.returncode == 0, done.stderr
    assert "corpus.jsonl:1: not JSON" in done.stderr
    assert done.stderr.splitlines()[5:] == ["skipped: 7 lines in all"]
    assert [path.name for path in tmp_path.glob("tok*")] == ["tok.model"]
    again = train(*arguments)
    assert (again.returncode, "tok.model exists; choose another --output" in again.stderr) == (64, True)
    assert train(*arguments, "--overwrite").returncode == 0


def test_settings_out_of_range(tmp_path):
    base = ("--input", tmp_path, "--output", tmp_path / "tok")
    for flags in (("--vocab-size", 0), ("--vocab-size", 300, "--max-lines", 0)):
        done = train(*base, *flags)
        assert (done.returncode, f"{flags[-2]} 0: expected" in done.stderr) == (64, True)
    (tmp_path / "a.txt").write_text(Path(json.__file__).read_text())
    done = train("--input", tmp_path / "a.txt", "--vocab-size", 400, "--output", tmp_path / "a.txt" / "tok")
    assert (done.returncode, "cannot write" in done.stderr) == (74, True)
