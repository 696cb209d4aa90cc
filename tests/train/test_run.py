import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from engine.checkpoint.run_directory import open_checkpoint
from engine.config.schema import Config
from engine.data.storage.writer import seal
from engine.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
)
from engine.parallel.layout import Layout, init_distributed
from engine.plan.memory import estimate_fullest
from engine.testing.distributed import run_ranks
from engine.testing.runs import losses, read_records, run_config, run_training, run_until_signal, write_dataset
from engine.testing.tokenizers import write_chatml_tokenizer
from engine.train import run, start
from engine.train.evaluate import Evaluation
from engine.train.log import RunLog
from engine.train.run import train

ROOT = Path(__file__).parents[2]


def tensors(config) -> dict:
    """Every stored tensor of the newest checkpoint."""
    checkpoint = open_checkpoint(config.run.dir)
    kinds = ("param", "exp_avg", "exp_avg_sq")
    return {(kind, name): checkpoint.read(name, kind=kind) for kind in kinds for name in checkpoint.tensors(kind)}


def assert_bitwise(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.equal(b[key]), key


def test_one_two_and_four_ranks_give_the_same_losses(workspace):
    reference = None
    for ranks in (1, 2, 4):
        directory = str(workspace / f"run{ranks}")
        config = run_config(workspace, "--run.dir", directory, "--train.eval_steps", "3", steps=50)
        records = run_training(config, ranks)
        values = losses(records)
        assert len(values) == 50
        values += [record["eval_loss"] for record in records if "eval_loss" in record]
        assert len(values) == 52
        reference = reference or values
        assert values == pytest.approx(reference, rel=1e-5)
        assert records[-2]["samples"] == 200
        assert records[-2]["tokens"] == 200 * 32
    assert reference[49] < 0.7 * reference[0]


def test_microbatches_do_not_change_the_result(workspace):
    one = run_training(run_config(workspace, "--run.dir", str(workspace / "a"), "--batch.micro", "4"))
    four = run_training(run_config(workspace, "--run.dir", str(workspace / "b"), "--batch.micro", "1"))
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(workspace, precision):
    common = ("--precision.mode", precision, "--checkpoint.interval", "4", "--train.eval_steps", "1")
    whole = run_config(workspace, *common, "--run.dir", str(workspace / "whole"), "--checkpoint.interval", "0")
    cut = run_config(workspace, *common, "--run.dir", str(workspace / "cut"))
    expected = run_training(whole, 2)
    accounts = run_until_signal(cut, 2, step=5, rank=1)
    stopped_at = open_checkpoint(cut.run.dir).state.step
    assert accounts == [f"stopped by SIGTERM after step {stopped_at}; the state is saved"] * 2
    assert 5 <= stopped_at < 10
    records = run_training(cut, 2)
    assert losses(records) == losses(expected)
    assert [r["eval_loss"] for r in records if "eval_loss" in r] == [
        r["eval_loss"] for r in expected if "eval_loss" in r
    ]
    assert_bitwise(tensors(whole), tensors(cut))
    kinds = [event["event"] for event in read_records(cut.run.dir / "events.jsonl")]
    assert kinds.count("start") == 1
    assert kinds.count("resume") == 1
    exits = [event["code"] for event in read_records(cut.run.dir / "events.jsonl") if event["event"] == "exit"]
    assert exits == [75, 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_every_stop_signal_saves(workspace, number):
    config = run_config(workspace, steps=500)
    (account,) = run_until_signal(config, 1, step=2, number=number)
    assert account.startswith(f"stopped by {signal.Signals(number).name} after step")
    assert open_checkpoint(config.run.dir).state.step >= 2


def test_a_stop_before_the_first_step_does_not_claim_a_checkpoint(workspace, monkeypatch):
    monkeypatch.setattr(Evaluation, "before_training", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="after step 0; nothing to save yet"):
        train(run_config(workspace))
    assert not (workspace / "run/checkpoints").exists()


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_any_number_of_ranks_resumes_any_other(workspace, before, after):
    whole = run_config(workspace, "--run.dir", str(workspace / "whole"))
    expected = run_training(whole, 1)
    run_until_signal(run_config(workspace), before, step=5)
    records = run_training(run_config(workspace), after)
    assert losses(records) == pytest.approx(losses(expected), rel=1e-5)


def test_extending_the_run_keeps_the_order_of_the_samples(workspace):
    flat = ("--lr_schedule.kind", "constant")
    short = run_config(workspace, *flat, steps=6)
    long = run_config(workspace, *flat, "--run.dir", str(workspace / "long"), steps=12)
    run_training(short)
    extended = run_training(run_config(workspace, *flat, steps=12))
    assert losses(extended) == losses(run_training(long))


def test_finishing_twice_changes_nothing(workspace):
    config = run_config(workspace, steps=3)
    first = losses(run_training(config))
    assert losses(run_training(config)) == first


@pytest.mark.parametrize("preset", ["tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-starcoder2"])
def test_every_family_trains(workspace, preset):
    values = losses(run_training(run_config(workspace, preset=preset, steps=20), 2))
    assert values[-1] < 0.9 * values[0]


def test_a_nan_is_printed_and_stops_the_run(workspace, capfd):
    config = run_config(workspace, "--optimizer.lr", "1e19", "--optimizer.weight_decay", "0", steps=50)
    with pytest.raises(NonFiniteError, match="the last 3 steps up to"):
        train(config)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert "loss nan" in lines[-1]
    assert "1 skipped: NaN or infinite gradients" in lines[-1]
    record = read_records(config.run.dir / "metrics.jsonl")[-1]
    assert record["loss"] is None
    assert record["skipped"] == 1
    assert read_records(config.run.dir / "events.jsonl")[-1]["code"] == 71


def test_ranks_wait_for_each_other_as_long_as_the_setting_says(workspace, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "init_distributed", lambda *_, **options: asked.append(options) or init_distributed("cpu"))
    train(run_config(workspace, "--parallel.timeout_s", "77", "--parallel.connect_timeout_s", "7", steps=1))
    assert asked == [{"timeout_s": 77, "connect_timeout_s": 7}]
    with pytest.raises(ConfigError, match=r"parallel\.timeout_s.* 60"):
        run_config(workspace, "--parallel.timeout_s", "59")


def test_little_is_printed_before_the_first_step(workspace, capfd):
    train(run_config(workspace, "--train.eval_steps", "1", steps=1))
    lines = capfd.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("step "))
    assert first <= 40
    assert [line.split()[-1] for line in lines if " tokens to " in line] == ["train", "valid"]


def snapshot(directory) -> set:
    return set(directory.rglob("*"))


def refused(workspace, error: type, match: str, *overrides: str, world_size: int = 1, **changes) -> None:
    """The run is refused with a message, and nothing is left behind."""
    before = snapshot(workspace)
    if world_size == 1:
        with pytest.raises(error, match=match):
            train(run_config(workspace, *overrides, **changes))
    else:
        with pytest.raises(RuntimeError, match=match):
            run_training(run_config(workspace, *overrides, **changes), world_size)
    assert snapshot(workspace) == before


def test_an_indivisible_batch(workspace):
    refused(workspace, ConfigError, "batch.global = 5 is not a multiple", "--batch.global", "5", world_size=2)


def test_missing_data(workspace):
    refused(workspace, DataError, "nowhere", "--data.train", f"[{{path: {workspace}/nowhere}}]")


def test_a_missing_tokenizer(workspace):
    refused(workspace, ConfigError, "none.model", "--data.tokenizer", str(workspace / "none.model"))


def test_a_tokenizer_that_is_too_large_for_the_model(workspace):
    refused(workspace, ConfigError, "model.vocab_size = 100 is smaller than the 257", "--model.vocab_size", "100")


def test_the_wrong_tokenizer_for_the_data(workspace):
    (workspace / "corpus.checksums").unlink()
    path = workspace / "corpus.json"
    path.write_text(path.read_text().replace('"tokenizer_hash":', '"tokenizer_hash": "0123", "was":'))
    refused(workspace, DataError, "made with a byte tokenizer of hash 0123")


def test_a_token_beyond_the_vocabulary(workspace):
    (workspace / "corpus.json").unlink()
    data = np.fromfile(workspace / "corpus.bin", dtype=np.uint16)
    data[7] = 300
    data.tofile(workspace / "corpus.bin")
    refused(workspace, DataError, r"tokens\[7\] = 300; .*it is token 7 of document 0")
    data[7], data[5003] = data[8], 300  # between the places that are checked at the start
    data.tofile(workspace / "corpus.bin")
    with patch("engine.data.samples.vocabulary.PROBES", 1), patch("engine.data.samples.vocabulary.PROBE_TOKENS", 8):
        seal(workspace / "corpus")
        batch = ("--batch.global", "32", "--batch.micro", "32")  # all of the data in 14 steps
        with pytest.raises(DataError, match=r"corpus\.bin: tokens\[5003\] = 300; .* of document"):
            train(run_config(workspace, *batch, steps=14))


def test_changed_data_are_refused_on_resume_and_at_the_start(workspace, capfd):
    train(run_config(workspace, steps=2))
    path = workspace / "corpus.bin"
    data = np.fromfile(path, dtype=np.uint16)
    data[7000] ^= 1
    data.tofile(path)
    refused(workspace, DataError, r"corpus\.bin: xxh3-64 of bytes 0 \.\. .*triaxis inspect .*corpus --seal", steps=4)
    seal(workspace / "corpus")
    newest = workspace / "run/checkpoints/step_00000002"
    message = f"^corpus in data.train: the tokens are not those with which {newest} .*data.on_change = warn"
    refused(workspace, DataError, message, steps=4)
    capfd.readouterr()
    train(run_config(workspace, "--data.on_change", "warn", steps=4))
    assert "warning     corpus in data.train: the tokens are not" in capfd.readouterr().out
    train(run_config(workspace, "--data.seq_length", "24", steps=5))  # a changed setting is told, not refused
    assert "warning     the data or their order" in capfd.readouterr().out


def test_data_without_checksums_train_and_are_named(workspace, capfd):
    (workspace / "corpus.checksums").unlink()
    train(run_config(workspace, steps=2))
    assert f"{workspace}/corpus has no checksums" in capfd.readouterr().out
    seal(workspace / "corpus")  # between two starts: nothing has changed
    train(run_config(workspace, steps=3))
    assert "has no checksums" not in capfd.readouterr().out


@pytest.mark.parametrize("cut", [1, 2, 1000])
def test_a_truncated_bin(workspace, cut):
    path = workspace / "corpus.bin"
    os.truncate(path, path.stat().st_size - cut)
    refused(workspace, DataError, "corpus.bin")


def test_a_damaged_idx(workspace):
    path = workspace / "corpus.idx"
    content = bytearray(path.read_bytes())
    content[60] ^= 0x40
    path.write_bytes(content)
    refused(workspace, DataError, "corpus.idx")


def test_a_dataset_that_is_too_small(workspace):
    write_dataset(workspace / "corpus", num_documents=2)
    refused(workspace, DataError, "has .* tokens and needs", "--data.seq_length", "512")


def test_an_empty_dataset(workspace):
    write_dataset(workspace / "corpus", num_documents=0)
    refused(workspace, DataError, "has 0 tokens")


def test_a_misspelt_checkpoint_is_never_a_random_start(workspace):
    refused(workspace, CheckpointError, "no such checkpoint directory", "--run.resume", str(workspace / "runn"))


def test_a_model_that_cannot_fit_is_refused_before_it_is_allocated(workspace):
    match = "(?s)GiB per rank.*model.preset = tiny"
    refused(workspace, OutOfMemoryError, match, "--model.num_layers", "100", "--model.hidden_size", "65536")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_layout_that_cannot_be_is_refused_with_all_that_is_wrong(workspace, world_size):
    match = "(?s)start 15 ranks.*parallel.tp can be 1, 2, 4.*make it at most 4"
    overrides = ("--parallel.tp", "3", "--parallel.pp", "5")
    refused(workspace, ConfigError, match, *overrides, world_size=world_size)


def layout_with_unlike_memory(config: Config) -> Layout:
    """Of two ranks, of which the second has so little memory that the model must be cut."""
    world = init_distributed("cpu")
    needed = estimate_fullest(config, Layout(dp=2), torch.float32, "cpu").total
    with patch.object(start, "available", lambda *_: needed * (2, 1)[world.rank]):
        return start.arrange_ranks(config, world)[0].layout


def test_ranks_with_unlike_memory_choose_one_layout(workspace):
    config = run_config(workspace, "--parallel.tp", "auto", "--parallel.pp", "auto")
    assert run_ranks(2, layout_with_unlike_memory, config) == [Layout(tp=2), Layout(tp=2)]


def test_the_run_directory_of_another_model(workspace):
    run_training(run_config(workspace, steps=2))
    changed = ("--model.hidden_size", "32", "--train.steps", "4")
    match = r"belongs to another model:\n  model\.hidden_size: 64 in the checkpoint, 32 here"
    refused(workspace, CheckpointError, match, *changed)


def test_the_run_directory_of_another_tokenizer(workspace, capfd):
    room = ("--model.vocab_size", "259")
    train(run_config(workspace, *room, steps=2))
    (workspace / "corpus.json").unlink()  # which refuses other tokenizers
    other = (*room, "--data.tokenizer", str(write_chatml_tokenizer(workspace / "other")))
    newest = workspace / "run/checkpoints/step_00000002"
    elsewhere = ("--run.dir", str(workspace / "run2"))
    match = f"{newest} was trained with another tokenizer than .*other; resume with data.tokenizer = byte, or"
    refused(workspace, CheckpointError, match, *other, steps=4)
    refused(workspace, CheckpointError, match, *other, *elsewhere, "--run.resume", str(newest), steps=4)
    capfd.readouterr()
    train(run_config(workspace, *other, *elsewhere, "--model.from_checkpoint", str(newest), steps=1))
    assert f"{newest} was trained with another tokenizer, byte, than {workspace}/other" in capfd.readouterr().out
    moved = (workspace / "other").rename(workspace / "moved")  # the same ids at another path
    train(run_config(workspace, *room, "--data.tokenizer", str(moved), *elsewhere, steps=2))
    assert open_checkpoint(workspace / "run2").state.step == 2


def test_resume_never_refuses_a_used_directory(workspace):
    run_training(run_config(workspace, steps=2))
    refused(workspace, ConfigError, "holds a checkpoint of step 2", "--run.resume", "never")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(workspace, capfd):
    run_training(run_config(workspace, "--checkpoint.interval", "2", steps=4), 2)
    newest = open_checkpoint(workspace / "run").path
    shard = next(newest.glob("state-00001*"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    run_training(run_config(workspace, steps=6), 2)
    resumed = [event for event in read_records(workspace / "run/events.jsonl") if event["event"] == "resume"]
    assert [event["step"] for event in resumed] == [2]


def test_another_checkpoint_can_be_the_start(workspace):
    run_training(run_config(workspace, "--checkpoint.interval", "2", steps=4))
    source = workspace / "run/checkpoints/step_00000002"
    branch = run_config(workspace, "--run.dir", str(workspace / "branch"), "--run.resume", str(source), steps=4)
    records = run_training(branch)
    assert [record["step"] for record in records] == [3, 4]
    assert losses(records) == losses(read_records(workspace / "run/metrics.jsonl"))[2:]


def test_data_of_another_tool_train_unchanged(workspace):
    """Megatron's own files: no metadata, several sequences a document."""
    ours = losses(run_training(run_config(workspace, "--run.dir", str(workspace / "ours"))))
    for kind in ("json", "checksums"):
        (workspace / f"corpus.{kind}").unlink()
    path = workspace / "corpus.idx"
    content = path.read_bytes()
    magic, version, code, sequences, documents = struct.unpack_from("<9sQBQQ", content)
    lengths = np.frombuffer(content, "<i4", sequences, 34)
    halves = np.stack((lengths // 2, lengths - lengths // 2), 1).ravel().astype("<i4")
    pointers = np.concatenate(([0], halves.cumsum()[:-1])).astype("<i8") * 2
    header = struct.pack("<9sQBQQ", magic, version, code, 2 * sequences, documents)
    starts = np.arange(0, 2 * sequences + 1, 2, dtype="<i8")
    path.write_bytes(header + halves.tobytes() + pointers.tobytes() + starts.tobytes())
    assert losses(run_training(run_config(workspace))) == ours


def test_a_full_disk_ends_the_run_and_keeps_the_old_checkpoint(workspace):
    run_training(run_config(workspace, steps=2))
    before = tensors(run_config(workspace))
    with pytest.raises(RuntimeError, match="StorageError: checkpoint not saved: rank 0"):
        run_ranks(2, train_with_small_files, run_config(workspace, steps=4))
    assert_bitwise(tensors(run_config(workspace)), before)
    assert [p.name for p in (workspace / "run/checkpoints").iterdir() if p.name.startswith("step")] == ["step_00000002"]
    assert read_records(workspace / "run/events.jsonl")[-1]["code"] == 74


def train_with_small_files(config) -> None:
    """As on a full disk: no file may grow beyond 100 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    train(config)


def test_the_same_shapes_can_be_another_model(workspace):
    run_training(run_config(workspace, steps=2))
    refused(workspace, CheckpointError, "model.norm_eps: 1e-05 in the checkpoint, 0.1 here", "--model.norm_eps", "0.1")


def test_what_could_not_be_exported_is_not_trained(workspace):
    refused(workspace, ConfigError, "qk_norm", "--model.qk_norm", "true")


def test_changed_settings_are_told_on_resume(workspace, capfd):
    train(run_config(workspace, steps=2))
    train(run_config(workspace, "--optimizer.lr", "0.001", steps=3))
    assert "changed     optimizer.lr: 0.003 -> 0.001" in capfd.readouterr().out
    changes = [e["setting"] for e in read_records(workspace / "run/events.jsonl") if e["event"] == "changed"]
    assert changes == ["optimizer.lr: 0.003 -> 0.001", "train.steps: 2 -> 3"]


def test_a_finished_run_has_nothing_to_do(workspace, capfd):
    train(run_config(workspace, steps=3))
    train(run_config(workspace, steps=2))
    said = "nothing to do: step 3 is done and train.steps = 2; to continue, raise train.steps; for a new run, choose"
    assert said in capfd.readouterr().out


def test_a_broken_run_does_not_rotate_its_good_checkpoints_away(workspace):
    run_training(run_config(workspace, steps=2))
    broken = ("--optimizer.lr", "1e30", "--checkpoint.interval", "4", "--log.interval", "100", "--train.steps", "50")
    with pytest.raises(NonFiniteError):
        train(run_config(workspace, *broken, "--optimizer.clip_grad", "0"))
    newest = open_checkpoint(workspace / "run").state.step
    assert newest < 10
    assert (workspace / "run/checkpoints/step_00000002").exists()


def test_two_runs_do_not_write_into_one_directory(workspace):
    log = RunLog(workspace / "run", active=True)
    with pytest.raises(ConfigError, match="another run is writing there"):
        train(run_config(workspace))
    log.close()
    train(run_config(workspace, steps=1))


def test_falling_back_to_an_imported_model_forgets_the_damaged_moments(workspace):
    clean, start = run_config(workspace, "--run.dir", str(workspace / "clean")), workspace / "start"
    run_training(run_config(workspace, "--run.dir", str(start), steps=2))
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py")]
    hf = workspace / "hf"
    for source, target in ((start, hf), (hf, workspace / "clean"), (hf, workspace / "run")):
        subprocess.run([*command, "--from", source, "--to", target], check=True, capture_output=True)
    expected = losses(run_training(clean))
    run_training(run_config(workspace, steps=4))
    (shard,) = (workspace / "run/checkpoints/step_00000004").glob("state-*")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1  # in the last exp_avg_sq
    shard.write_bytes(content)
    assert losses(run_training(run_config(workspace))) == expected
