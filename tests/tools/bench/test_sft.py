"""The benchmark of fine-tuning, at a size where only its working can be judged."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import ConfigError, TriaxisError

PROGRAM = Path(__file__).parents[3] / "tools" / "bench" / "sft.py"
OTHER = """
import argparse, json, sys
parser = argparse.ArgumentParser()
for name in ("model", "conversations", "mode", "seq-length", "lr", "threads"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
read = json.load(open(args.conversations))
json.load(open(args.model + "/config.json"))
targets = sum(map(sum, read["targets"]))
places = len(read["ids"]) * max(map(len, read["ids"]))
print("something else")
print("trl 0.0, threads", args.threads, flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": 0.5, "loss": LOSS, "places": places, "targets": targets}), flush=True)
"""


@pytest.fixture
def program(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("bench_sft", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    sizes = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "num_kv_heads": 2}
    small = {"head_dim": 32, "vocab_size": 300, "max_position": 64}
    monkeypatch.setattr(module, "MODEL", {**module.MODEL, **sizes, **small})
    monkeypatch.setattr(module, "SEQ_LENGTH", 64)
    monkeypatch.setattr(module, "MEDIAN_LENGTH", 24)
    monkeypatch.setattr(module, "OTHERS", tmp_path)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def other(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "sft_trl.py").write_text(text, encoding="utf-8")
    return ["--rounds", "2", "--conversations", "12", "--others", "trl", "--python", sys.executable]


def lines(printed: str) -> dict[str, str]:
    return {line[:16].strip(): line[16:] for line in printed.splitlines() if line.startswith(("triaxis", "trl"))}


def test_packed_and_padded_have_one_loss(program, capsys):
    program.main(["--rounds", "2", "--conversations", "12"])
    printed = capsys.readouterr().out
    assert "12 conversations of 16 to 64 tokens" in printed
    found = lines(printed)
    assert list(found) == ["triaxis, packed", "triaxis, padded"]
    assert found["triaxis, packed"].endswith("1.00×")
    assert f"{12 * 64:8,} " in found["triaxis, padded"]
    assert f"{7 * 64:8,} " in found["triaxis, packed"]


def test_every_conversation_is_learned_in_every_step(program, tmp_path):
    conversations = program.make_conversations(12)
    program._write(tmp_path, conversations)
    step = program._ours(tmp_path, packed=True)
    first, second = step(), step()
    assert first.targets == second.targets == conversations.targets.sum()
    assert second.loss < first.loss


def test_a_packing_that_is_open_is_refused(program, monkeypatch):
    """The initial weights are large enough for a loss to show what a token saw."""
    batches = program.batches
    monkeypatch.setattr(
        program, "batches", lambda data, **settings: batches(data, **settings | {"document_mask": False})
    )
    monkeypatch.setattr(program, "TOLERANCE", program.TOLERANCE_OF_OTHERS)
    with pytest.raises(TriaxisError, match=r"triaxis, padded has first loss .*, but triaxis, packed has"):
        program.main(["--rounds", "1", "--conversations", "12"])


def test_other_work_is_refused(program):
    ours, theirs = ("triaxis, packed", "triaxis, padded"), "trl, packed"
    step = program.Step(1.0, 9.0, 640, 300)
    same = {**dict.fromkeys(ours, step), theirs: program.Step(2.0, 9.0009, 700, 300)}
    program.require_same_work(same)
    for name, loss, targets in ((theirs, 9.002, 300), (theirs, float("nan"), 300), (ours[1], 9.00002, 300)):
        with pytest.raises(TriaxisError, match=f"{name} has first loss {loss}, but"):
            program.require_same_work({**same, name: program.Step(1.0, loss, 640, targets)})
    with pytest.raises(TriaxisError, match="trl, packed has 299 targets, but triaxis, packed has 300"):
        program.require_same_work({**same, theirs: program.Step(1.0, 9.0, 640, 299)})


def test_conversations(program, monkeypatch):
    monkeypatch.setattr(program, "SEQ_LENGTH", 1024)
    monkeypatch.setattr(program, "MEDIAN_LENGTH", 160)
    conversations = program.make_conversations(400)
    lengths, ids = conversations.lengths, conversations.ids
    assert np.median(lengths) == pytest.approx(160, rel=0.02)
    assert lengths.mean() > 1.4 * np.median(lengths)  # a long tail
    assert (lengths.min(), lengths.max()) == (16, 1024)
    assert lengths.argmax() not in (0, lengths.size - 1)  # mixed
    assert ids.size == conversations.targets.size == lengths.sum() == conversations.num_pairs + 400
    assert (ids.min(), ids.max()) == (0, 299)
    assert conversations.targets.mean() == pytest.approx(0.5, abs=0.01)
    starts = np.cumsum(lengths) - lengths
    assert not conversations.targets[starts].any()  # nothing comes before them
    assert conversations.targets[np.cumsum(lengths) - 1].all()


def test_table(program):
    def steps(*seconds: float, places: int) -> list:
        return [program.Step(s, 9.0, places, 300) for s in seconds]

    rounds = {"triaxis, packed": steps(1.0, 3.0, 2.0, places=640), "trl, padded": steps(6.0, 5.0, 4.0, places=1280)}
    first = {"triaxis, packed": rounds["triaxis, packed"][0], "trl, padded": program.Step(1.0, 9.5, 1280, 300)}
    _, packed, padded = program.table(rounds, first, 600)
    assert " ".join(packed.split()) == "triaxis, packed 150 (100 – 300) 300 640 93.8% 6.2% 9.000000 1.00×"
    assert " ".join(padded.split()) == "trl, padded 60 (50 – 75) 120 1,280 46.9% 53.1% 9.500000 2.50×"


def test_another_project_takes_its_turns(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "TOLERANCE_OF_OTHERS", 100.0)
    program.main(other(tmp_path, OTHER.replace("LOSS", "5.5")))
    printed = capsys.readouterr().out
    for mode in ("padded", "single", "packed"):
        assert f"trl, {mode}: trl 0.0, threads 1\n" in printed
    assert "something else" not in printed
    found = lines(printed)
    assert "5.500000" in found["trl, packed"]
    assert f"{12 * 64:8,} " in found["trl, packed"]


def test_another_project_with_another_loss(program, tmp_path):
    with pytest.raises(TriaxisError, match=r"trl, padded has first loss 2\.5, but"):
        program.main(other(tmp_path, OTHER.replace("LOSS", "2.5")))


@pytest.mark.parametrize("text", ["raise SystemExit('no such package')", OTHER.replace("LOSS", "1 / 0")])
def test_another_project_that_fails(program, tmp_path, text):
    with pytest.raises(ConfigError, match=r"--others trl with --python .* gave no result: .*(no such|division)"):
        program.main(other(tmp_path, text))


def test_an_interpreter_that_is_not_there(program, tmp_path):
    with pytest.raises(ConfigError, match="--python /nowhere/python: No such file"):
        program.main([*other(tmp_path, OTHER), "--python", "/nowhere/python"])


@pytest.mark.parametrize("flag", ["--rounds", "--conversations", "--threads"])
def test_numbers_that_cannot_be(program, flag):
    with pytest.raises(ConfigError, match=f"{flag} 0: expected 1 or more"):
        program.main([flag, "0"])
