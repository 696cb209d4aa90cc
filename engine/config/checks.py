"""Checks across settings; each problem names the values and the setting to change."""

from collections.abc import Iterator

from engine.config.schema import (
    Config,
    DataConfig,
    LrScheduleConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)


def cross_checks(config: Config) -> list[str]:
    """List all problems of `config`, in the order of its sections."""
    return [
        *_task(config),
        *_model(config.model, config.data),
        *_data(config.data, config.train),
        *_schedule(config.lr_schedule, config.optimizer, config.train),
        *_parallel(config.parallel, config.precision),
        *_precision(config.precision, config.model),
        *_optimizer(config.optimizer),
    ]


def _task(config: Config) -> Iterator[str]:
    train, data, sft = config.train, config.data, config.task == "sft"
    if not train.steps and not (sft and train.epochs):
        yield f"train.steps{' or train.epochs' if sft else ''}: required, and at least 1"
    if not sft and any((train.epochs, train.neftune_alpha, not data.packing)):
        yield "train.epochs, train.neftune_alpha and data.packing = false apply only to task = sft"
    if sft and not data.document_mask:
        yield "data.document_mask = false would let conversations attend to each other; task = sft needs true"
    if (train.early_stopping > 0 or config.checkpoint.keep_best) and not train.eval_steps:
        yield (
            "train.early_stopping and checkpoint.keep_best compare evaluations: set train.eval_steps and eval_interval "
            "too, or early_stopping = 0 and keep_best = false"
        )


def _model(model: ModelConfig, data: DataConfig) -> Iterator[str]:
    if model.num_heads % model.num_kv_heads != 0:
        yield f"model.num_kv_heads = {model.num_kv_heads} does not divide model.num_heads = {model.num_heads}"
    if model.rotary_dim % 2 != 0:
        share = f" · model.partial_rotary_factor = {model.partial_rotary_factor}" * (model.partial_rotary_factor != 1)
        yield f"model.head_dim = {model.head_dim}{share} is odd; rotary positions need an even size"
    if model.zero_centered_norm and model.norm == "layer":
        yield "model.zero_centered_norm = true applies only to model.norm = rms"
    if model.window_layers is not None and model.sliding_window is None:
        yield f"model.window_layers = {list(model.window_layers)} needs model.sliding_window, the size of their window"
    if beyond := [layer for layer in model.window_layers or () if layer >= model.num_layers]:
        yield f"model.window_layers has {beyond[0]}, but the last of model.num_layers is {model.num_layers - 1}"
    if data.seq_length > model.max_position:
        yield (
            f"data.seq_length = {data.seq_length} is longer than model.max_position = {model.max_position}; "
            "lower the first or raise the second"
        )


def _data(data: DataConfig, train: TrainConfig) -> Iterator[str]:
    if min(data.split) < 0 or data.split[0] <= 0:
        yield f"data.split = {list(data.split)}: shares must be >= 0 and the first > 0"
    if train.eval_steps > 0 and data.split[1] == 0 and not data.valid:
        yield (
            f"train.eval_steps = {train.eval_steps} needs a validation share in data.split = {list(data.split)}, or "
            "data.valid"
        )


def _schedule(schedule: LrScheduleConfig, optimizer: OptimizerConfig, train: TrainConfig) -> Iterator[str]:
    if schedule.min_lr > optimizer.lr:
        yield f"lr_schedule.min_lr = {schedule.min_lr} is above optimizer.lr = {optimizer.lr}"
    if schedule.decay_steps is not None and schedule.kind != "wsd":
        yield f"lr_schedule.decay_steps only applies to kind wsd; kind = {schedule.kind}"
    warmup, decay = schedule.warmup_steps, schedule.decay_steps or 0
    if 0 < train.steps < warmup + decay:
        given = f"warmup_steps = {warmup}" + (f" + decay_steps = {decay}" if decay else "")
        short = "--lr_schedule.warmup_steps 0" + (" --lr_schedule.decay_steps 1" if decay else "")
        yield (
            f"train.steps = {train.steps} is less than lr_schedule.{given}; set it to at least {warmup + decay} or, to "
            f"try a few steps, add {short}"
        )


def _parallel(parallel: ParallelConfig, precision: PrecisionConfig) -> Iterator[str]:
    if (parallel.virtual_stages > 1) != (parallel.schedule == "interleaved"):
        yield (
            f"parallel.virtual_stages = {parallel.virtual_stages} and parallel.schedule = {parallel.schedule}: the "
            "interleaved schedule, and only that one, needs virtual_stages of at least 2"
        )
    if parallel.recompute_layers is not None and parallel.recompute == "none":
        yield f"parallel.recompute_layers = {parallel.recompute_layers} needs parallel.recompute = selective or full"
    if parallel.compile and parallel.schedule == "zero_bubble":
        yield (
            "parallel.compile = true compiles both halves of the backward pass into one, but parallel.schedule = "
            "zero_bubble runs them separately; choose one of the two"
        )
    if parallel.compile and precision.mode == "fp8":
        yield (
            "parallel.compile = true would compile the layers' bf16 matmuls, not those of precision.mode = fp8; "
            "choose one of the two"
        )
    if parallel.fp8_param_gather:
        yield from _fp8_param_gather(parallel, precision)


def _fp8_param_gather(parallel: ParallelConfig, precision: PrecisionConfig) -> Iterator[str]:
    if precision.mode != "fp8":
        yield (
            f"parallel.fp8_param_gather = true gathers the weights of FP8 matmuls, but precision.mode = "
            f"{precision.mode} has none; set it to fp8, or fp8_param_gather = false"
        )
    if precision.recipe == "blockwise":
        yield (
            "parallel.fp8_param_gather = true needs one scale per weight, but precision.recipe = blockwise has one per "
            "128 × 128 block, and the ranks' shards cut blocks; use tensorwise or delayed, or fp8_param_gather = false"
        )
    if not parallel.sharded_optimizer:
        yield (
            "parallel.sharded_optimizer = false gathers no parameters; parallel.fp8_param_gather = true needs "
            "sharded_optimizer = true"
        )


def _precision(precision: PrecisionConfig, model: ModelConfig) -> Iterator[str]:
    if precision.bf16_first_layers + precision.bf16_last_layers > model.num_layers:
        yield f"precision.bf16_first_layers + bf16_last_layers is more than model.num_layers = {model.num_layers}"


def _optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    if optimizer.moments == "bf16" and optimizer.betas[1] > 0.99:
        yield (
            f"optimizer.moments = bf16 is too coarse for betas[1] = {optimizer.betas[1]}: changes below 0.4 % are "
            "rounded away; use betas[1] <= 0.99 or moments = fp32"
        )
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas = {list(optimizer.betas)}: both must be in [0, 1)"
