"""From a configuration to a finished run: build everything, resume, and drive the loop with its periodic work."""

import math
import os
import time
from dataclasses import asdict
from functools import partial

import torch

import engine
from engine.checkpoint.manager import Checkpoint, State, save
from engine.checkpoint.reader import BEST, checkpoints_dir, step_name
from engine.config.derived import with_steps
from engine.config.load import changed_settings, read_yaml
from engine.config.schema import Config
from engine.data.samples.sft import SftDataset
from engine.data.tokenizers.tokenizer import CHAT_TEMPLATE
from engine.errors import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    StorageError,
    as_triaxis_error,
)
from engine.model.parameters import kv_replicas
from engine.ops.choice import describe_ops
from engine.optim.optimizer import ShardedAdamW
from engine.parallel.agreement import first_problem, gather_ints, on_all_ranks, run_on_all_ranks
from engine.parallel.layout import World, build_process_groups, init_distributed, shutdown_distributed
from engine.plan.describe import describe
from engine.plan.layouts import choose_layout, require_fit
from engine.plan.memory import ClusterSpec, available
from engine.plan.throughput import flops_per_token, peak_tflops
from engine.train.evaluate import compares_evaluations, evaluate, note_evaluation, stops_early
from engine.train.inputs import (
    Inputs,
    chat_template,
    describe_template,
    model_dtype,
    open_inputs,
    packing_summary,
    rows_of,
)
from engine.train.metrics import RunLog, StepReporter, duration
from engine.train.signals import StopRequest
from engine.train.state import pieces, restore, restore_weights
from engine.train.step import DistributedModel, build_model
from engine.train.trainer import Progress, Trainer


def train(config: Config) -> None:
    """Run the training that `config` describes on this rank.

    Raises:
        TriaxisError: with the exit code of what went wrong; `Interrupted` after a stop request.
    """
    world = init_distributed(config.run.device)
    log: RunLog | None = None
    try:
        world, reason = _arrange(config, world)
        inputs = run_on_all_ranks(world, lambda: open_inputs(config, world))
        config = run_on_all_ranks(world, lambda: with_steps(config, rows_of(inputs.train_data)))
        log = run_on_all_ranks(world, lambda: _open_log(config, world, chat_template(inputs.train_data)))
        _describe_start(config, world, inputs, log, reason)
        trainer = _build(config, world, inputs, log)
        log.open_metrics(trainer.progress.step, tensorboard=config.log.tensorboard)
        _train(trainer, inputs, log)
        log.event("exit", code=0)
    except Exception as error:
        _record_failure(error, log)
        raise
    finally:
        if log is not None:
            log.close()
        shutdown_distributed()


def _arrange(config: Config, world: World) -> tuple[World, str]:
    """Put the ranks on the grid that the configuration asks for; with the reason for it."""
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    ranks = _ranks(config, world)
    layout, reason = run_on_all_ranks(world, lambda: choose_layout(config, ranks))
    run_on_all_ranks(world, lambda: require_fit(config, layout, ranks))
    return build_process_groups(world, layout, kv_replicas=kv_replicas(config.model, layout.tp)), reason


def _ranks(config: Config, world: World) -> ClusterSpec:
    """All ranks as the weakest of them, so that all choose the same layout; a collective."""
    device = world.device
    per_node = min(gather_ints(world, world.local_size))
    capacity = min(gather_ints(world, available(device, world.local_size)))
    return ClusterSpec(world.layout.world_size, per_node, capacity, device.type, model_dtype(config, device.type))


def _open_log(config: Config, world: World, template: str | None) -> RunLog:
    try:
        log = RunLog(config.run.dir, active=world.is_main)
        if world.is_main:
            (config.run.dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            if template is not None:
                (config.run.dir / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"run.dir = {config.run.dir} cannot be written: {error}") from None
    return log


def _build(config: Config, world: World, inputs: Inputs, log: RunLog) -> Trainer:
    """Model, optimizer and trainer, with initial or restored weights."""
    weights, fresh = inputs.weights, not inputs.checkpoints
    model, optimizer = build_model(
        config, world, inputs.dtype, seed=config.run.seed if fresh and weights is None else None
    )
    trainer = Trainer(config, world, model, optimizer, inputs.train_data)
    if fresh:
        if weights is not None:
            run_on_all_ranks(world, lambda: restore_weights(optimizer, weights))
            optimizer.broadcast_params()
        origin = "from scratch" if weights is None else f"with the weights of {weights.path}"
        log.say(f"start       {origin}: there is no checkpoint in {config.run.dir}")
        log.event("start", seed=config.run.seed, weights=None if weights is None else str(weights.path))
        return trainer
    checkpoint = _restore_newest(world, model, optimizer, inputs.checkpoints, log)
    state = checkpoint.state
    trainer.progress = Progress(state.step, state.consumed_samples, state.consumed_tokens)
    trainer.best = state.best if compares_evaluations(config) else None
    log.say(f"start       resumes from {checkpoint.path}: step {state.step} of {config.train.steps}")
    log.event("resume", step=state.step, path=str(checkpoint.path))
    for change in changed_settings(read_yaml(checkpoint.config_yaml_path), config):
        log.say(f"changed     {change}")
        log.event("changed", setting=change)
    if state.data_fingerprint not in ("", inputs.train_data.fingerprint()):
        log.say(
            "warning     the data or their order (datasets, split, seq_length, seed) are not those of the checkpoint"
        )
    return trainer


def _restore_newest(
    world: World, model: DistributedModel, optimizer: ShardedAdamW, checkpoints: list[Checkpoint], log: RunLog
) -> Checkpoint:
    """Restore from the first checkpoint that every rank can read completely."""
    for checkpoint, older in zip(checkpoints, [*checkpoints[1:], None], strict=True):
        try:
            run_on_all_ranks(world, lambda checkpoint=checkpoint: restore(optimizer, checkpoint, model.fp8))  # type: ignore[misc]
            optimizer.broadcast_params()
            return checkpoint
        except CheckpointError as error:
            if older is None:
                raise
            log.say(f"WARNING: {error}; going back to {older.path}")
            log.event("fallback", reason=str(error), path=str(older.path))
    raise AssertionError("there is at least one checkpoint")


def _train(trainer: Trainer, inputs: Inputs, log: RunLog) -> None:
    """Drive the loop; everything that happens every n steps happens here."""
    config, world = trainer.config, trainer.world
    if stops_early(trainer):
        log.say(
            f"nothing to do: stopped early at step {trainer.progress.step}; to go on, raise train.early_stopping = "
            f"{config.train.early_stopping}"
        )
        return _say_best(trainer, log)
    if trainer.progress.step >= config.train.steps:
        log.say(f"nothing to do: step {trainer.progress.step} is done and train.steps = {config.train.steps}")
        return _say_best(trainer, log)
    stop = StopRequest()
    reporter = StepReporter(config, world, log, _flops_per_step(config, inputs), rows_of(inputs.train_data))
    if trainer.progress.step == 0:
        _evaluate(trainer, inputs, log)
    reporter.restart_clock()
    saved_step = trainer.progress.step
    for result in trainer.steps(stop):
        last = result.step == config.train.steps
        evaluation_due = last or _due(result.step, config.train.eval_interval)
        save_due = last or _due(result.step, config.checkpoint.interval)
        may_save = save_due or (evaluation_due and compares_evaluations(config))
        try:
            reporter(result, trainer.progress, now=may_save)
        except NonFiniteError as error:
            raise on_all_ranks(world, error) from None
        if not (evaluation_due or save_due):
            continue  # pausing would wait for the device
        with reporter.paused():
            if evaluation_due:
                improved = _evaluate(trainer, inputs, log)
                save_due = save_due or (improved and config.checkpoint.keep_best)
            if save_due or stops_early(trainer):
                _save(trainer, inputs, log)
                saved_step = result.step
        if stops_early(trainer):
            log.say(f"stops early: {config.train.early_stopping} evaluations in a row without a new best")
            break
    if trainer.stopped_by:
        if saved_step < trainer.progress.step:
            _save(trainer, inputs, log)
        kept = "the state is saved" if trainer.progress.step else "there is nothing to save yet"
        text = f"stopped by {trainer.stopped_by} after step {trainer.progress.step}; {kept}"
        raise on_all_ranks(world, Interrupted(text))
    tokens = f"{trainer.progress.tokens:,} {'target ' * (config.task == 'sft')}tokens"
    log.say(f"finished: {trainer.progress.step} steps, {tokens}; checkpoint in {config.run.dir}")
    _say_best(trainer, log)


def _say_best(trainer: Trainer, log: RunLog) -> None:
    best, root = trainer.best, checkpoints_dir(trainer.config.run.dir)
    if best is not None:
        kept = (root / step_name(best.step)).is_dir()
        where = f"kept as {root / BEST}" if kept else "not kept" + ", see checkpoint.keep_best" * (best.step > 0)
        log.say(f"best: evaluation loss {best.loss:.4f} at step {best.step}, {where}")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _evaluate(trainer: Trainer, inputs: Inputs, log: RunLog) -> bool:
    """Evaluate and record; whether it is a new best."""
    if inputs.valid_data is None:
        return False
    started = time.perf_counter()
    loss = evaluate(trainer.model, inputs.valid_data, trainer.config, trainer.world)
    improved = note_evaluation(trainer, loss)
    perplexity = math.exp(min(loss, 700.0))
    step = trainer.progress.step
    took = duration(time.perf_counter() - started)
    log.say(f"evaluation at step {step} | loss {loss:.4f} | perplexity {perplexity:.2f} | took {took}")
    log.metrics("eval", {"step": step, "time": time.time(), "eval_loss": loss, "eval_ppl": perplexity})
    return improved


def _save(trainer: Trainer, inputs: Inputs, log: RunLog) -> None:
    config, world, progress = trainer.config, trainer.world, trainer.progress
    started = time.perf_counter()
    trainer.optimizer.parameters.finish_gathering()
    state = State(
        step=progress.step,
        consumed_samples=progress.samples,
        consumed_tokens=progress.tokens,
        loss_scale=None,
        data_fingerprint=inputs.train_data.fingerprint(),
        layout=asdict(world.layout),
        best=trainer.best,
    )
    template = [] if chat_template(inputs.train_data) is None else [config.run.dir / CHAT_TEMPLATE]
    others = [file for file in inputs.tokenizer.files if not (template and file.name == CHAT_TEMPLATE)]
    try:
        path = save(
            config.run.dir,
            pieces(trainer.optimizer, trainer.model.fp8),
            state,
            config_yaml=config.to_yaml(),
            tokenizer_files=[*others, *template],
            keep_last=config.checkpoint.keep_last,
            rank=world.rank,
            world_size=world.layout.world_size,
            agree=partial(first_problem, world),
        )
    except StorageError as error:
        log.event("save_failed", step=progress.step, reason=str(error))
        raise on_all_ranks(world, error) from None
    seconds = time.perf_counter() - started
    log.say(f"saved {path} in {seconds:.1f} s")
    log.event("save", step=progress.step, path=str(path), seconds=seconds)


def _describe_start(config: Config, world: World, inputs: Inputs, log: RunLog, reason: str) -> None:
    """The configuration once, and what follows from it."""
    layout = world.layout
    ranks = f"{layout.world_size} rank(s) on {world.device.type}"
    backend = "" if world.group is None else (", nccl" if world.device.type == "cuda" else ", gloo")
    log.say(f"Triaxis {engine.__version__}, torch {torch.__version__}, {ranks}{backend}")
    log.say(config.to_yaml().rstrip())
    for line in describe(config, layout, reason, inputs.dtype, world.device.type):
        log.say(line)
    log.say(f"operators   {describe_ops(config.ops, world.device)}")
    peak = peak_tflops(world.device)
    log.say(f"peak        {f'{peak:.0f} TFLOP/s in bf16' if peak else 'not known for this device, so MFU is n/a'}")
    for data in inputs.train_data.datasets:
        log.say(f"data        {data.prefix}: {data.num_tokens:,} tokens in {data.num_documents:,} documents")
    for line in packing_summary(inputs.train_data, "train", config):
        log.say(line)
    for line in packing_summary(inputs.valid_data, "valid", config) if inputs.valid_data is not None else ():
        log.say(line)
    for line in describe_template(inputs.train_data, inputs.tokenizer):
        log.say(line)
    log.event("layout", world_size=layout.world_size, **asdict(layout), device=str(world.device))


def _flops_per_step(config: Config, inputs: Inputs) -> float:
    """Of the places of a global batch that hold tokens."""
    data = inputs.train_data
    filled, length = (data.packing.efficiency, data.mean_length) if isinstance(data, SftDataset) else (1.0, None)
    places = config.batch.global_ * config.data.seq_length
    return filled * places * flops_per_token(config, inputs.table, length)


def _record_failure(error: Exception, log: RunLog | None) -> None:
    known = as_triaxis_error(error)
    if log is not None:
        code, advice = (known.exit_code, known.advice) if known else (1, "see the traceback in the log")
        log.event("exit", code=code, reason=str(error), advice=advice)
