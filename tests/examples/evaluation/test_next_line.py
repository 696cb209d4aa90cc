import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[3] / "examples" / "evaluation"


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("next_line", FOLDER / "next_line.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def write(main, tmp_path, monkeypatch):
    """Writes questions about modules, and reads them."""
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "new" / "questions.jsonl"

    def run(texts: list[str]) -> list[dict]:
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        monkeypatch.setattr("sys.argv", ["next_line.py", "--corpus", str(corpus), "--output", str(output)])
        main()
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_questions_are_about_held_out_modules_and_have_one_answer(write):
    trained = ["known = by + heart * 2\n" * 9] * 19
    lines = [f"    value_{i} = compute({i}, other_{i})" for i in range(12)]
    questions = write([*trained, "\n".join(lines)])
    assert len(questions) == 8  # each line with four before it
    for question in questions:
        choices, answer = question["choices"], question["answer"]
        assert len(set(choices)) == 4
        assert len({len(choice) for choice in choices}) == 1
        assert len({tuple(sorted(Counter(choice).items())) for choice in choices}) == 1
        assert (question["context"] + choices[answer]) in "\n".join(lines)
    assert len({question["answer"] for question in questions}) > 1
    assert write([*trained, "\n".join(lines)]) == questions


def test_the_task_asks_for_what_the_questions_have(write):
    task = yaml.safe_load((FOLDER / "next_line.yaml").read_text())
    question = write(["a = b(c, d)\n" * 9])[0]
    assert {task["doc_to_text"].strip("{}"), task["doc_to_choice"], task["doc_to_target"]} == set(question)
    assert list(task["dataset_kwargs"]["data_files"]) == [task["test_split"]]
    assert task["dataset_kwargs"]["data_files"]["test"] == "data/evaluation/next_line.jsonl"


def test_a_missing_corpus_is_named(main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["next_line.py"])
    with pytest.raises(SystemExit):
        main()
    assert (
        "data/quickstart/stdlib.jsonl does not exist; `bash examples/quickstart.sh` creates it"
        in capsys.readouterr().err
    )


def test_the_help_says_what_options_do(main, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["next_line.py", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    for default in ("data/quickstart/stdlib.jsonl", "data/evaluation/next_line.jsonl", "1000"):
        assert f"(default: {default})" in shown
