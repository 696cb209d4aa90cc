"""Fine-tuning: the same numbers in every layout, packed or not, and the numbers of others."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint.huggingface.config import hf_config
from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.manifest import Best
from engine.checkpoint.opening import open_model
from engine.checkpoint.run_directory import open_checkpoint
from engine.config.schema import DatasetConfig
from engine.config.schema import ParallelConfig as Parallel
from engine.data.samples.batch import Batch, collate
from engine.data.samples.sample import Sample
from engine.data.samples.sft import SftDataset
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import CheckpointError, DataError
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import logical_shapes
from engine.parallel.layout import NO_TP, TensorParallel
from engine.testing.models import logical_gradients, logical_state, new_decoder, new_parameters, tiny_config
from engine.testing.parity import Case, Problem, deviation, measure
from engine.testing.runs import (
    CONVERSATIONS,
    losses,
    run_config,
    run_training,
    run_until_signal,
    write_conversations,
)
from engine.train.evaluate import note_evaluation, stops_early
from engine.train.run import train
from engine.train.step import embedding_noise
from engine.train.trainer import Progress

S = 32
TEMPLATE = "{{ messages[0].content }}"
# A step is an epoch, so that packed and unpacked steps hold the same conversations. With a larger rate the model knows
# them by heart after 15 steps, and relative deviations of what is left of the loss mean little.
PACKED = Problem("tiny", {"task": "sft", "train.eval_steps": 9, "batch.global": 8, "optimizer.lr": 1e-3})
UNPACKED = Problem("tiny", {**PACKED.settings, "data.packing": False, "batch.global": len(CONVERSATIONS)})
ONE = Case(micro=2)
LAYOUTS = [
    Case(Parallel(tp=2), micro=4),
    Case(Parallel(pp=2), micro=2),
    Case(dp=2, micro=2),
    Case(Parallel(tp=2, pp=2), micro=2),
]


def test_every_layout_packed_or_not_gives_the_numbers_of_one_process(tmp_path):
    reference, *packed = measure(tmp_path / "packed", PACKED, [ONE, *LAYOUTS])
    unpacked = measure(tmp_path / "unpacked", UNPACKED, [ONE, *LAYOUTS])
    assert reference.losses[19] < 0.8 * reference.losses[0]
    problems = {
        f"{kind} {case}": deviation(outcome, reference).problems() + outcome.torn
        for kind, cases, outcomes in (("packed", LAYOUTS, packed), ("unpacked", [ONE, *LAYOUTS], unpacked))
        for case, outcome in zip(cases, outcomes, strict=True)
    }
    assert not any(problems.values()), problems


def test_noise_on_embeddings_is_the_same_in_every_layout(tmp_path):
    noisy = Problem("tiny", {**PACKED.settings, "train.neftune_alpha": 5})
    (plain,) = measure(tmp_path / "plain", PACKED, [ONE])
    reference, *others = measure(tmp_path / "noisy", noisy, [ONE, *LAYOUTS])
    assert all(not deviation(outcome, reference).problems() for outcome in others)
    assert reference.losses[0] != plain.losses[0]
    assert reference.losses[20] == plain.losses[20]  # evaluations are without


def test_noise_is_bounded_by_the_length_of_the_conversation_and_drawn_by_sample():
    config = run_config(Path("unused"), "--task=sft")
    batch = rows_of_batch(two_rows(), (3, 7))
    h, seed = config.model.hidden_size, config.run.seed
    noise = embedding_noise(batch, 5.0, h, seed, NO_TP)
    for start, stop in pairwise(batch.cu_seqlens):
        bound = 5 / ((stop - start) * h) ** 0.5
        largest = noise[start:stop].abs().max().item()
        assert 0.8 * bound < largest <= bound
    parts = [embedding_noise(batch, 5.0, h, seed, TensorParallel(rank, 4)) for rank in range(4)]
    assert torch.cat(parts).equal(noise)
    alone = embedding_noise(rows_of_batch(two_rows()[1:], (7,)), 5.0, h, seed, NO_TP)
    assert alone.equal(noise[S:])
    assert not embedding_noise(rows_of_batch(two_rows(), (3, 8)), 5.0, h, seed, NO_TP)[S:].equal(noise[S:])


def two_rows() -> list[Sample]:
    tokens = np.arange(S)
    return [Sample(tokens, tokens, np.array(cuts), np.ones(S, bool)) for cuts in ([10, 16], [4])]


def rows_of_batch(samples: list[Sample], numbers: tuple[int, ...]) -> Batch:
    return collate(samples, numbers, document_mask=True)


@pytest.fixture
def chats(tmp_path: Path) -> SftDataset:
    path = write_conversations(tmp_path / "chats")
    return SftDataset([DatasetConfig(path=path)], (1, 0, 0), "train", S, 1)


def alone_of(data: SftDataset) -> SftDataset:
    path = data.datasets[0].prefix
    return SftDataset([DatasetConfig(path=path)], (1, 0, 0), "train", S, 1, packed=False)


def loss_of(decoder, batch) -> torch.Tensor:
    flat = (x.flatten() for x in (batch.tokens, batch.positions, batch.labels, batch.loss_mask))
    return decoder.loss(*flat, batch.cu_seqlens, target_indices=batch.target_indices)


def test_the_packed_loss_is_the_sum_over_each_conversation_alone(chats):
    decoder = new_decoder(tiny_config(init_std=0.1))
    packed = [collate([chats.sample(i)], (i,), document_mask=True) for i in range(chats.num_rows)]
    single = alone_of(chats)
    apart = [collate([single.sample(i)], (i,), document_mask=True) for i in range(single.num_rows)]
    together, one_by_one = (sum(loss_of(decoder, batch).double() for batch in kind) for kind in (packed, apart))
    assert len(packed) == 8 and len(apart) == len(CONVERSATIONS)
    assert sum(batch.num_tokens for batch in packed) == sum(batch.num_tokens for batch in apart)
    torch.testing.assert_close(together, one_by_one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("preset", ["tiny", "tiny-mistral", "tiny-qwen3", "tiny-starcoder2"])
def test_a_conversation_never_sees_another(chats, preset):
    decoder = new_decoder(tiny_config(preset, init_std=0.1))
    row = next(i for i in range(8) if len(chats.conversations(i)) > 2)
    batch = collate([chats.sample(row)], (row,), document_mask=True)
    cuts, positions = batch.cu_seqlens, batch.positions.flatten()

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return decoder.logits(decoder(tokens, positions, decoder.attend_within(cuts)))

    before = logits(batch.tokens.flatten())
    for start, stop in pairwise(cuts):
        changed = batch.tokens.flatten().clone()
        changed[start] = (changed[start] + 1) % 256
        after = logits(changed)
        others = torch.ones(S, dtype=torch.bool)
        others[start:stop] = False
        assert after[others].equal(before[others])
        assert not after[start:stop].equal(before[start:stop])


def sft_config(directory: Path, *overrides: str, steps: int = 10):
    """Rows of 32, four to a step: two steps an epoch."""
    if not (directory / "chats.idx").exists():
        write_conversations(directory / "chats", chat_template=TEMPLATE)
    paths = f"--data.train=[{{path: {directory / 'chats'}}}]"
    return run_config(directory, paths, "--task=sft", "--data.split=[1, 0, 0]", *overrides, steps=steps)


def test_epochs_end_with_their_last_conversation(tmp_path):
    """Eight rows, three to a step: the sixth step has one row, and the run reads nothing twice."""
    config = sft_config(tmp_path, "--train.epochs=2", "--batch.global=3", steps=0)
    records = run_training(config)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    targets = sum(length // 2 for length in CONVERSATIONS)
    assert records[-1]["tokens"] == 2 * targets
    assert records[-1]["target_tokens_per_s"] > 0 and "tokens_per_s" not in records[-1]
    limited = sft_config(tmp_path, "--train.epochs=2", f"--run.dir={tmp_path / 'limited'}", steps=3)
    assert len(run_training(limited)) == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_goes_on_bitwise(tmp_path, ranks):
    options = ("--train.neftune_alpha=5", "--optimizer.lr=1e-2")
    whole = run_training(sft_config(tmp_path, *options, steps=12), ranks)
    twin = sft_config(tmp_path, *options, f"--run.dir={tmp_path / 'twin'}", steps=12)
    run_until_signal(twin, ranks, step=5)
    assert losses(run_training(twin, ranks)) == losses(whole)


def test_it_starts_from_a_checkpoint_of_another_layout_and_from_its_export(tmp_path):
    """And takes the weights alone: neither the step nor the moments."""
    first = run_training(sft_config(tmp_path, "--parallel.tp=2", "--optimizer.lr=1e-2", steps=6), 2)
    run = tmp_path / "run"
    checkpoint = open_checkpoint(run)
    shapes = logical_shapes(checkpoint.model)
    export(checkpoint, load_tokenizer("byte"), tmp_path / "hf", shapes, dtype=torch.float32)
    starts = {}
    for name, where in {"from_checkpoint": run, "from_hf": tmp_path / "hf"}.items():
        for ranks, pp in ((1, 1), (2, 2), (2, 1)):  # alone, in a pipeline, and with the weights in two shards
            options = (f"--model.{name}={where}", f"--run.dir={tmp_path / name}{ranks}{pp}", "--data.tokenizer=byte")
            records = run_training(sft_config(tmp_path, *options, f"--parallel.pp={pp}", steps=3), ranks)
            assert [record["step"] for record in records] == [1, 2, 3]
            starts[name, ranks, pp] = losses(records)
    reference = starts["from_checkpoint", 1, 1]
    assert reference[0] < 0.95 * first[0]["loss"]
    for values in starts.values():
        assert values == pytest.approx(reference, rel=1e-5)
    weights = open_model(tmp_path / "hf")
    assert weights.model.hidden_size == checkpoint.model.hidden_size


def test_early_stopping_keeps_the_best_checkpoint(tmp_path):
    """The model learns noise by heart: the loss on other noise has its best near the start."""
    write_conversations(tmp_path / "other", seed=1)
    options = [f"--data.valid=[{{path: {tmp_path / 'other'}}}]", "--train.eval_steps=99", "--train.eval_interval=2"]
    options += ["--train.early_stopping=3", "--checkpoint.keep_best=true", "--checkpoint.keep_last=1"]
    options += ["--checkpoint.interval=5", "--optimizer.lr=2e-2"]
    records = run_training(sft_config(tmp_path, *options, steps=200))
    evaluations = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    del evaluations[0]
    best = min(evaluations, key=lambda step: evaluations[step])
    last = max(evaluations)
    assert 0 < best < last < 200 and last == best + 6
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved == [f"step_{best:08}", f"step_{last:08}"]
    state = open_checkpoint(tmp_path / "run").state.best
    assert state is not None and (state.step, state.loss, state.worse) == (best, evaluations[best], 3)
    assert open_checkpoint(tmp_path / "run" / "best").state.step == best
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "best").state.step == best
    assert open_checkpoint(tmp_path / "run").state.step == last
    again = run_training(sft_config(tmp_path, *options, steps=200))  # nothing to do
    assert again == records


def test_nan_is_never_the_best_evaluation(tmp_path):
    options = ["--train.eval_steps=1", "--train.early_stopping=2", "--data.split=[9, 1, 0]"]
    trainer = SimpleNamespace(config=sft_config(tmp_path, *options), best=None)
    noted = []
    for step, loss in enumerate([math.nan, 3.0, math.nan, 2.0, 2.5, math.inf]):
        trainer.progress = Progress(step)
        noted.append((note_evaluation(trainer, loss), stops_early(trainer)))
    assert noted == [(False, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    assert trainer.best == Best(3, 2.0, 2)


def test_there_is_no_best_checkpoint_without_comparing(tmp_path):
    run_training(sft_config(tmp_path, steps=1))
    with pytest.raises(CheckpointError, match=r"best: evaluations were not compared; see checkpoint\.keep_best"):
        open_checkpoint(tmp_path / "run" / "best")


def test_what_the_start_tells_about_the_data(tmp_path, capfd):
    options = ["--data.split=[90, 10, 0]", "--train.eval_steps=9", "--batch.global=16", "--run.device=cpu"]
    train(sft_config(tmp_path, *options, steps=1))
    said = capfd.readouterr().out
    for part in (
        "sequences   train: 18 conversations in 7 sequences",
        "sequences   valid: 2 conversations in 1 sequences",
        "warning     batch.global = 16 is more than the 7 sequences of an epoch",
        "chat        with the template of the data; turns end with nothing",
        "| epoch 2.29 |",
        "target tokens; checkpoint in",
    ):
        assert part in said


def test_the_checkpoint_takes_the_chat_template_along(tmp_path):
    config = sft_config(tmp_path, steps=1)
    run_training(config)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert (saved / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE
    write_conversations(tmp_path / "other", chat_template="{{ other }}")
    both = f"--data.train=[{{path: {tmp_path / 'chats'}}}, {{path: {tmp_path / 'other'}}}]"
    with pytest.raises(RuntimeError, match=r"chats and .*other were preprocessed with different chat templates"):
        run_training(sft_config(tmp_path, both, steps=2))


def test_a_step_without_a_target_says_where_to_look(tmp_path):
    with IndexedDatasetWriter(tmp_path / "chats", np.uint16, masked=True) as writer:
        writer.add_documents(np.arange(64) % 9, [16] * 4, np.zeros(64, bool))
    with pytest.raises(RuntimeError, match=DataError.__name__ + r".*step 1 has no target tokens"):
        run_training(sft_config(tmp_path, steps=1))


def test_one_step_is_that_of_transformers(tmp_path):
    """Loss and all gradients of a whole step over conversations of many lengths, padded on their side."""
    transformers = pytest.importorskip("transformers")
    model = tiny_config(init_std=0.1)
    parameters = new_parameters(model)
    config: Any = transformers.LlamaConfig.from_dict(hf_config(model, dtype=torch.float32, bos_id=None, eos_id=None))
    llama: Any = transformers.LlamaForCausalLM._from_config(config)
    llama.load_state_dict(logical_state(model, parameters))
    path = write_conversations(tmp_path / "chats")
    data = SftDataset([DatasetConfig(path=path)], (1, 0, 0), "train", S, 1)
    batch = collate([data.sample(i) for i in range(8)], tuple(range(8)), document_mask=True)
    ours = loss_of(Decoder(model, Parameters(parameters)), batch) / batch.num_tokens
    ours.backward()

    source, width = data.datasets[0], max(CONVERSATIONS)
    ids, labels = torch.zeros(20, width, dtype=torch.long), torch.full((20, width), -100)
    attention = torch.zeros(20, width, dtype=torch.long)
    for j, length in enumerate(CONVERSATIONS):
        tokens = torch.tensor(source.tokens(source.document_start(j), length).tolist())
        is_target = torch.tensor(source.mask(source.document_start(j), length).tolist(), dtype=torch.bool)
        ids[j, :length], attention[j, :length] = tokens, 1
        labels[j, :length][is_target] = tokens[is_target]
    theirs = llama(input_ids=ids, attention_mask=attention, labels=labels).loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    expected = {name: parameter.grad for name, parameter in llama.named_parameters()}
    found = logical_gradients(model, parameters)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
