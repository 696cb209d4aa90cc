"""Names of other trainers: what they are here, and that the loader says so wherever they are typed."""

import pytest

from engine.config.foreign import MEGATRON, TRAINERS, counterpart, explain
from engine.config.load import _settings
from engine.config.schema import Config
from tests.config.minimal import MINIMAL, message

SETTINGS = {*_settings(Config), "task"}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_counterparts_are_settings(trainer):
    named = {counterpart(answer) for answer in TRAINERS[trainer].values()} - {None}
    assert named <= SETTINGS
    assert len(named) >= 8


@pytest.mark.parametrize("trainer", TRAINERS)
def test_answers_without_a_counterpart_do_not_begin_with_a_setting(trainer):
    for name, answer in TRAINERS[trainer].items():
        assert answer and not answer.endswith("."), name
        assert counterpart(answer) or answer.split()[0].rstrip(";,:") not in SETTINGS, name


def test_megatrons_sixty_commonest_are_known():
    assert len(MEGATRON) >= 60


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--max_steps 100", "max_steps: no such setting; use train.steps"),
        ("--max-steps 100", "max-steps: no such setting; use train.steps"),
        ("--train.max_steps=100", "train.max_steps: no such setting; use train.steps"),
        ("--learning_rate 1e-4", "learning_rate: no such setting; use optimizer.lr"),
        ("--lr 1e-4", "lr: no such setting; use optimizer.lr"),
        ("--per_device_train_batch_size 4", "per_device_train_batch_size: no such setting; use batch.micro"),
        (
            "--gradient_accumulation_steps 4",
            "gradient_accumulation_steps: no such setting; use batch.global; in sequences",
        ),
        ("--wandb true", "wandb: no such setting; not implemented: W&B"),
        ("--lora.r 8", "lora: no such setting; not implemented: LoRA"),
        ("--lora_alpha 8", "lora_alpha: no such setting; not implemented: LoRA"),
        ("--cp 2", "cp: no such setting; not implemented: context parallelism"),
        ("--resume runs/a", "resume: no such setting; use run.resume"),
        ("--micro_batch_size 4", "micro_batch_size: no such setting; use batch.micro"),
        ("--micro-batch-size 4", "micro-batch-size: no such setting; use batch.micro"),
        ("--gpus 8", "gpus: no such setting; the number of GPUs is not a setting: `triaxis train CONFIG --gpus N`"),
        ("--rank 2", "rank: no such setting; the number of ranks is not a setting: `triaxis train CONFIG --ranks N`"),
        ("--eval_steps 100", "eval_steps: no such setting; use train.eval_interval; train.eval_steps is the number of"),
        ("--bf16 --swiglu", "bf16: no such setting; use precision.mode = bf16"),
        ("--bf16 --swiglu", "swiglu: no such setting; use model.activation"),
        ("--moe-router-topk 2", "moe-router-topk: no such setting; not implemented: mixture of experts"),
        ("--training.local_batch_size 2", "training.local_batch_size: no such setting; use batch.micro"),
        ("--training.seed 2", "training.seed: no such setting; use run.seed"),
        ("--parallelism.dp 2", "parallelism.dp: no such setting; data parallelism uses the ranks that"),
        ("--interval 5", "interval: no such setting; use checkpoint.interval or log.interval"),
        ("--block_size 128", "block_size: no such setting; use data.seq_length"),
        ("--resume", "resume: no such setting; use run.resume; auto by default"),
        ("--model llama", "model = 'llama': a section, not a setting; its settings are preset, from_hf, "),
        ("--seed 3", "seed: no such setting; use run.seed"),
    ],
)
def test_the_loader_names_ours_wherever_it_is_typed(typed, said):
    assert f"\n  {said}" in message({}, *typed.split())


@pytest.mark.parametrize("ours", sorted(SETTINGS))
def test_a_setting_of_ours_needs_a_value(ours):
    assert message({}, f"--{ours}") == f"--{ours} needs a value, as in --{ours} VALUE"


def test_foreign_names_in_a_file_are_answered_each():
    theirs = {
        "tokens": {"train_steps": 5, "micro_batch_size": 2},
        "optimizer": {"learning_rate_scheduler": {"learning_rate": 1}},
    }
    text = message(theirs | {"model": MINIMAL["model"] | {"num_hidden_layers": 2}})
    for said in (
        "tokens.train_steps: no such setting; use train.steps",
        "tokens.micro_batch_size: no such setting; use batch.micro",
        "optimizer.learning_rate_scheduler.learning_rate: no such setting; use optimizer.lr",
        "model.num_hidden_layers: no such setting; use model.num_layers",
    ):
        assert f"\n  {said}" in text


@pytest.mark.parametrize("name", ["frobnicate", "x", "train.frobnicate", "momentum_schedule"])
def test_unknown_names_get_no_neighbor(name):
    assert message({}, f"--{name}", "1").splitlines()[1:] == [f"  {name}: no such setting"]


def test_names_that_no_trainer_has():
    assert explain("optimizer.golbal") is None
    assert explain("TRAINING.STEPS") == "use train.steps"
