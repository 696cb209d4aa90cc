"""Start of a run: choose the layout, open the log, describe the run, initialize or restore the weights."""

import os
from dataclasses import asdict
from functools import partial

import torch

import engine
from engine.checkpoint.model_directory import ModelDirectory
from engine.checkpoint.reader import Checkpoint
from engine.config.load import changed_settings, read_yaml
from engine.config.schema import Config
from engine.data.tokenizers.files import CHAT_TEMPLATE
from engine.errors import CheckpointError, StorageError
from engine.formatting import counted
from engine.heartbeat import Heartbeat
from engine.ops.choice import describe_ops
from engine.parallel.agreement import gather_ints, run_on_all_ranks
from engine.parallel.connect import check_hardware_queues
from engine.parallel.layout import CHANNELS, World, build_process_groups
from engine.plan.describe import describe_run
from engine.plan.layouts import choose_layout, require_fit
from engine.plan.memory import ClusterSpec, available, link_options
from engine.plan.throughput import peak_tflops
from engine.train.evaluate import compares_evaluations
from engine.train.inputs import Inputs, describe_data, model_dtype
from engine.train.log import RunLog
from engine.train.measure import choose_attention, choose_onednn
from engine.train.state import restore, restore_weights
from engine.train.step import build_model
from engine.train.trainer import Progress, Trainer


def arrange_ranks(config: Config, world: World) -> tuple[World, str]:
    """Choose a layout and build its process groups; return the world and the reason for the layout. A collective.

    Raises:
        ConfigError: no layout works for the configuration, or pipeline stages would share one hardware queue.
        OutOfMemoryError: the run does not fit in the memory of the ranks.
    """
    if config.run.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    ranks = _ranks(config, world)
    layout, reason = run_on_all_ranks(world, lambda: choose_layout(config, ranks))
    run_on_all_ranks(world, lambda: require_fit(config, layout, ranks))
    run_on_all_ranks(world, lambda: check_hardware_queues(os.environ, layout.pp, world.device.type))
    return build_process_groups(world, layout, **link_options(config, layout.tp)), reason


def _ranks(config: Config, world: World) -> ClusterSpec:
    """Describe the cluster by its smallest rank, so that all ranks choose the same layout. A collective."""
    device, dtype = world.device, model_dtype(config.precision.mode, world.device.type)
    per_node = min(gather_ints(world, world.local_size))
    capacity = min(gather_ints(world, available(device, world.local_size)))
    return ClusterSpec(world.layout.world_size, per_node, capacity, device.type, dtype)


def open_log(config: Config, world: World, template: str | None, heartbeat: Heartbeat) -> RunLog:
    """Open the log, and write the resolved configuration and the data's chat template to the run directory.

    Raises:
        ConfigError: another run is writing there.
        StorageError: the directory cannot be written.
    """
    try:
        log = RunLog(config.run.dir, active=world.is_main, heartbeat=heartbeat)
        if world.is_main:
            (config.run.dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            if template is not None:
                (config.run.dir / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"run.dir = {config.run.dir} cannot be written: {error}") from None
    return log


def describe_start(config: Config, world: World, inputs: Inputs, log: RunLog, reason: str) -> None:
    """Log the configuration, and the layout, operators and data of the run."""
    layout = world.layout
    ranks = f"{layout.world_size} rank(s) on {world.device.type}"
    backend = "" if world.group is None else (", nccl" if world.device.type == "cuda" else ", gloo")
    log.say(f"Triaxis {engine.__version__}, torch {torch.__version__}, {ranks}{backend}")
    log.say(config.to_yaml().rstrip())
    for line in describe_run(config, layout, reason, inputs.dtype, world.device.type):
        log.say(line)
    if world.links:
        log.say(f"links       {describe_links(world)}")
    log.say(f"operators   {describe_ops(config.model, config.ops, world.device)}")
    peak = peak_tflops(world.device)
    log.say(f"peak        {f'{peak:.0f} TFLOP/s in bf16' if peak else 'not known for this device, so MFU is n/a'}")
    for data in inputs.train_data.datasets:
        log.say(f"data        {data.prefix}: {data.num_tokens:,} tokens in {data.num_documents:,} documents")
    for line in describe_data(config, inputs.train_data, inputs.valid_data, inputs.tokenizer):
        log.say(line)
    log.event("layout", world_size=layout.world_size, **asdict(layout), device=str(world.device))


def describe_links(world: World) -> str:
    """Format what this rank has connected, and how long it took."""
    pairs = sum(link.axis in CHANNELS for link in world.links)
    groups = counted(len(world.links) - pairs, "group")
    stages = f" and {counted(pairs, 'pair')} of stages" if pairs else ""
    return f"{groups}{stages} of this rank connected in {world.connect_s:.1f} s"


def build_trainer(config: Config, world: World, inputs: Inputs, log: RunLog) -> Trainer:
    """Build model, optimizer and trainer, with restored, imported or initial weights.

    Raises:
        CheckpointError: on all ranks, if any rank could not read the checkpoints or the weights.
    """
    from_scratch = not inputs.checkpoints and inputs.weights is None
    log.heartbeat.phase = "measuring implementations of operators"
    seed, onednn = config.run.seed if from_scratch else None, choose_onednn(config, world, inputs.dtype, log)
    attention = choose_attention(config, world, inputs, log)
    log.heartbeat.phase = "initializing the model"
    model, optimizer = build_model(config, world, inputs.dtype, seed=seed, onednn=onednn, attention=attention)
    trainer = Trainer(config, world, model, optimizer, inputs.train_data)
    if inputs.checkpoints:
        _resume(trainer, inputs, log)
    else:
        _start_fresh(trainer, inputs.weights, log)
    return trainer


def _start_fresh(trainer: Trainer, weights: ModelDirectory | None, log: RunLog) -> None:
    run, model, optimizer = trainer.config.run, trainer.config.model, trainer.optimizer
    if weights is not None:
        log.heartbeat.phase = "loading the initial weights"
        run_on_all_ranks(trainer.world, partial(restore_weights, optimizer, weights))
        optimizer.broadcast_params()
        for what in weights.ignored:
            log.say(f"not used    {what}")
    source = model.from_hf or model.from_checkpoint
    origin = "from scratch" if source is None else f"with the weights of {source}"
    log.say(f"start       {origin}: no checkpoint in {run.dir}")
    log.event("start", seed=run.seed, weights=None if source is None else str(source))


def _resume(trainer: Trainer, inputs: Inputs, log: RunLog) -> None:
    """Restore the newest usable checkpoint and its progress, and log the settings that have changed since."""
    config, checkpoint = trainer.config, _restore_newest(trainer, inputs.checkpoints, log)
    state = checkpoint.state
    trainer.progress = Progress(state.step, state.consumed_samples, state.consumed_tokens)
    trainer.best = state.best if compares_evaluations(config) else None
    log.say(f"start       resumes from {checkpoint.path}: step {state.step} of {config.train.steps}")
    log.event("resume", step=state.step, path=str(checkpoint.path))
    for change in changed_settings(read_yaml(checkpoint.config_yaml_path), config):
        log.say(f"changed     {change}")
        log.event("changed", setting=change)
    if state.data_fingerprint not in ("", inputs.train_data.fingerprint()):
        log.say("warning     the data or their order (datasets, split, seq_length, seed) differ from the checkpoint's")


def _restore_newest(trainer: Trainer, checkpoints: list[Checkpoint], log: RunLog) -> Checkpoint:
    """Restore the first checkpoint that every rank can read completely, and return it."""
    optimizer, fp8 = trainer.optimizer, trainer.model.fp8
    for checkpoint, older in zip(checkpoints, [*checkpoints[1:], None], strict=True):
        log.heartbeat.phase = f"loading {checkpoint.path}"
        try:
            run_on_all_ranks(trainer.world, partial(restore, optimizer, checkpoint, fp8))
            optimizer.broadcast_params()
            return checkpoint
        except CheckpointError as error:
            if older is None:
                raise
            log.say(f"WARNING: {error}; falling back to {older.path}")
            log.event("fallback", reason=str(error), path=str(older.path))
    raise AssertionError("there is at least one checkpoint")
