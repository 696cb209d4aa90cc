import pytest

from tests.config.minimal import FINE_TUNING, message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"num_kv_heads": 3}}, "model.num_kv_heads = 3 does not divide model.num_heads = 4"),
        ({"model": {"head_dim": 15}}, "model.head_dim = 15 is odd"),
        ({"data": {"seq_length": 99999}}, "longer than model.max_position = 4096"),
        ({"lr_schedule": {"min_lr": 1.0}}, "lr_schedule.min_lr = 1.0 is above optimizer.lr"),
        ({"lr_schedule": {"warmup_steps": 11}}, "is less than lr_schedule.warmup_steps = 11; set it to at least 11"),
        ({"lr_schedule": {"decay_steps": 5}}, "only applies to kind wsd"),
        ({"data": {"split": [0, 1, 1]}}, "the first > 0"),
        ({"data": {"split": [1, 0, 0]}, "train": {"eval_steps": 1}}, "needs a validation share"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "both must be in [0, 1)"),
        ({"optimizer": {"betas": [0.9, 0.999], "moments": "bf16"}}, "use betas[1] <= 0.99 or moments = fp32"),
        ({"parallel": {"virtual_stages": 2}}, "virtual_stages = 2 and parallel.schedule = 1f1b: the interleaved"),
        ({"parallel": {"schedule": "interleaved"}}, "virtual_stages = 1 and parallel.schedule = interleaved"),
        ({"parallel": {"recompute_layers": 1}}, "recompute_layers = 1 needs parallel.recompute = selective or full"),
        ({"parallel": {"compile": True, "schedule": "zero_bubble"}}, "choose one of the two"),
        ({"parallel": {"fp8_param_gather": True}}, "but precision.mode = auto has none; set it to fp8"),
        (
            {"parallel": {"fp8_param_gather": True}, "precision": {"mode": "fp8", "recipe": "blockwise"}},
            "needs one scale per weight, but precision.recipe = blockwise has one per 128 × 128 block",
        ),
        (
            {"parallel": {"fp8_param_gather": True, "sharded_optimizer": False}, "precision": {"mode": "fp8"}},
            "parallel.sharded_optimizer = false gathers no parameters",
        ),
        ({"parallel": {"grad_reduce_dtype": "fp16"}}, "parallel.grad_reduce_dtype"),
        ({"parallel": {"layers_per_stage": [2, -1]}}, "parallel.layers_per_stage.1 = -1"),
    ],
)
def test_settings_that_do_not_fit_together(changes, expected):
    assert expected in message(changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"steps": 0}}, "train.steps: required, and at least 1"),
        ({**FINE_TUNING, "train": {"steps": 0}}, "train.steps or train.epochs: required, and at least 1"),
        (
            {"train": {"steps": 5, "epochs": 2}},
            "train.epochs, train.neftune_alpha and data.packing = false apply only to task = sft",
        ),
        ({"data": {"packing": False}}, "apply only to task = sft"),
        (
            {"task": "sft", "data": {"document_mask": False}},
            "data.document_mask = false would let conversations attend",
        ),
        ({"train": {"early_stopping": 2}}, "train.early_stopping and checkpoint.keep_best compare evaluations"),
        ({"model": {"preset": "tiny", "from_hf": "a"}}, "model.preset and model.from_hf exclude each other"),
    ],
)
def test_settings_of_fine_tuning_that_do_not_fit_together(changes, expected):
    assert expected in message(changes)
