"""From a configuration to a finished run: build everything, resume, and drive the loop with its periodic work."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

import engine
from engine.checkpoint.hf_config import hf_config
from engine.checkpoint.manager import Checkpoint, State, candidates, open_checkpoint, save
from engine.config import Config, changed_settings, read_yaml
from engine.data.pretrain import PretrainDataset
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    NonFiniteError,
    StorageError,
    TriaxisError,
    as_triaxis_error,
    error_of,
)
from engine.model.parameters import kv_replicas, parameter_table
from engine.ops.choice import in_words, require_implementations
from engine.optim.optimizer import ShardedAdamW
from engine.parallel.fp8 import require_device
from engine.parallel.layout import World, arrange, connect, disconnect
from engine.parallel.table import ParameterTable
from engine.plan.describe import describe
from engine.plan.layouts import choose_layout, require_fit
from engine.plan.memory import Ranks, available
from engine.plan.throughput import flops_per_token, peak_tflops
from engine.train.evaluate import evaluate
from engine.train.metrics import RunLog, StepReporter, duration
from engine.train.signals import StopRequest
from engine.train.state import pieces, restore
from engine.train.step import DistributedModel, build
from engine.train.trainer import Progress, Trainer

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a run reads; opened and checked before anything large is allocated.

    `checkpoints` are those it may start from, the best first; none for a fresh start.
    """

    table: ParameterTable
    dtype: torch.dtype
    tokenizer: Tokenizer
    train_data: PretrainDataset
    valid_data: PretrainDataset | None
    checkpoints: list[Checkpoint]


def train(config: Config) -> None:
    """Run the training that `config` describes on this rank.

    Raises:
        TriaxisError: with the exit code of what went wrong; `Interrupted` after a stop request.
    """
    world = connect(config.run.device)
    log: RunLog | None = None
    try:
        world, reason = _arrange(config, world)
        inputs = together(world, lambda: open_inputs(config, world))
        log = together(world, lambda: _open_log(config, world))
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
        disconnect()


def _arrange(config: Config, world: World) -> tuple[World, str]:
    """Put the ranks on the grid that the configuration asks for; with the reason for it."""
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    ranks = _ranks(config, world)
    layout, reason = together(world, lambda: choose_layout(config, ranks))
    together(world, lambda: require_fit(config, layout, ranks))
    return arrange(world, layout, kv_replicas=kv_replicas(config.model, layout.tp)), reason


def _ranks(config: Config, world: World) -> Ranks:
    """All ranks as the weakest of them, so that all choose the same layout; a collective."""
    size, device = world.layout.world_size, world.device
    mine = [world.local_size, available(device, world.local_size)]
    everyones = world.sum_on_host([n * (rank == world.rank) for rank in range(size) for n in mine])
    per_node, capacity = min(everyones[::2]), min(everyones[1::2])
    return Ranks(size, per_node, capacity, device.type, model_dtype(config, device.type))


def model_dtype(config: Config, device_type: str) -> torch.dtype:
    """The dtype of the parameters that are multiplied with."""
    mode = config.precision.mode
    bf16 = mode in ("bf16", "fp8") or (mode == "auto" and device_type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def together(world: World, action: Callable[[], T]) -> T:
    """Do something on every rank that may fail on some; then all ranks raise an error of one class. A collective."""
    failure: TriaxisError | None = None
    try:
        result = action()
    except Exception as error:
        failure = as_triaxis_error(error)
        if failure is None:
            raise
    mine = failure.exit_code if failure else 0
    codes = world.sum_on_host([mine * (rank == world.rank) for rank in range(world.layout.world_size)])
    code = next((code for code in codes if code), None)
    if code is None:
        return result
    text = world.first_problem(None if failure is None else str(failure))
    raise _for_all(world, error_of(code, text or ""))


def open_inputs(config: Config, world: World) -> Inputs:
    """Open everything the run reads, and refuse what cannot work."""
    require_device(config, world.device)
    require_implementations(config.ops, world.device)
    dtype, table = model_dtype(config, world.device.type), parameter_table(config.model)
    hf_config(config.model, dtype=dtype, bos_id=None, eos_id=None)  # what could not be exported is not trained
    tokenizer = open_tokenizer(config)
    train_data = open_data(config, "train", tokenizer)
    valid_data = open_data(config, "valid", tokenizer) if config.train.eval_steps else None
    checkpoints = _choose_checkpoints(config, print if world.is_main else lambda _: None)
    for checkpoint in checkpoints:
        checkpoint.require("param", {tensor.name: tensor.shape for tensor in table.logical()})
        _require_same_architecture(checkpoint, config)
    return Inputs(table, dtype, tokenizer, train_data, valid_data, checkpoints)


def open_tokenizer(config: Config) -> Tokenizer:
    """The run's tokenizer, which must not be larger than the model's vocabulary."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} entries of "
            f"data.tokenizer = {config.data.tokenizer}; set model.vocab_size to at least that"
        )
    return tokenizer


def open_data(config: Config, part: str, tokenizer: Tokenizer) -> PretrainDataset:
    """One split of the datasets, checked against the tokenizer and the vocabulary."""
    data = PretrainDataset(
        config.data.train,
        split=config.data.split,
        part=part,  # type: ignore[arg-type]
        seq_length=config.data.seq_length,
        seed=config.run.seed,
    )
    data.check_tokenizer(tokenizer.hash)
    data.check_vocabulary(config.model.vocab_size)
    return data


def _require_same_architecture(checkpoint: Checkpoint, config: Config) -> None:
    """Tensors of the same shapes can belong to another model. What may differ are settings that mean nothing to trained
    weights and those that people change on purpose to lengthen the context."""
    stored, wanted = checkpoint.model_config().model_dump(), config.model.model_dump()
    may_differ = {"preset", "init_std", "max_position", "rope_theta", "rope_scaling", "sliding_window"}
    different = [
        f"model.{key} = {wanted[key]}, in the checkpoint {value}"
        for key, value in stored.items()
        if value != wanted[key] and key not in may_differ
    ]
    if different:
        raise CheckpointError("\n  ".join([f"{checkpoint.path} is of another model:", *different]))


def _choose_checkpoints(config: Config, report: Callable[[str], None]) -> list[Checkpoint]:
    """Where to start from: what run.dir holds, newest first; else what `run.resume` names; else nothing.

    A path below run.dir is taken literally, so that a run can go back to an older step.
    """
    resume, own = config.run.resume, config.run.dir
    if resume not in ("auto", "never"):
        named = open_checkpoint(Path(resume))
        inside = own.resolve() in Path(resume).resolve().parents
        return [named] if inside else candidates(own, report) or [named]
    found = candidates(own, report)
    if resume == "never" and found:
        raise ConfigError(
            f"run.resume = never, but {own} holds a checkpoint of step {found[0].state.step}; "
            "choose another run.dir, or run.resume = auto to go on"
        )
    return found


def _open_log(config: Config, world: World) -> RunLog:
    try:
        log = RunLog(config.run.dir, active=world.is_main)
        if world.is_main:
            (config.run.dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"run.dir = {config.run.dir} cannot be written: {error}") from None
    return log


def _build(config: Config, world: World, inputs: Inputs, log: RunLog) -> Trainer:
    """Model, optimizer and trainer, with initial or restored weights."""
    model, optimizer = build(config, world, inputs.dtype, seed=None if inputs.checkpoints else config.run.seed)
    trainer = Trainer(config, world, model, optimizer, inputs.train_data)
    if not inputs.checkpoints:
        log.say(f"start       from scratch: there is no checkpoint in {config.run.dir}")
        log.event("start", seed=config.run.seed)
        return trainer
    checkpoint = _restore_newest(world, model, optimizer, inputs.checkpoints, log)
    state = checkpoint.state
    trainer.progress = Progress(state.step, state.consumed_samples, state.consumed_tokens)
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
            together(world, lambda checkpoint=checkpoint: restore(optimizer, checkpoint, model.fp8))  # type: ignore[misc]
            optimizer.publish()
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
    if trainer.progress.step >= config.train.steps:
        log.say(f"nothing to do: step {trainer.progress.step} is done and train.steps = {config.train.steps}")
        return
    stop = StopRequest()
    reporter = StepReporter(config, world, log, flops_per_token(config, inputs.table))
    if trainer.progress.step == 0:
        _evaluate(trainer, inputs, log)
    reporter.restart_clock()
    saved_step = trainer.progress.step
    for result in trainer.steps(stop):
        last = result.step == config.train.steps
        save_due = last or _due(result.step, config.checkpoint.interval)
        try:
            reporter(result, trainer.progress, now=save_due)
        except NonFiniteError as error:
            raise _for_all(world, error) from None
        evaluation_due = last or _due(result.step, config.train.eval_interval)
        if not (evaluation_due or save_due):
            continue  # pausing would wait for the device
        with reporter.paused():
            if evaluation_due:
                _evaluate(trainer, inputs, log)
            if save_due:
                _save(trainer, inputs, log)
                saved_step = result.step
    if trainer.stopped_by:
        if saved_step < trainer.progress.step:
            _save(trainer, inputs, log)
        kept = "the state is saved" if trainer.progress.step else "there is nothing to save yet"
        text = f"stopped by {trainer.stopped_by} after step {trainer.progress.step}; {kept}"
        raise _for_all(world, Interrupted(text))
    log.say(
        f"finished: {trainer.progress.step} steps, {trainer.progress.tokens:,} tokens; checkpoint in {config.run.dir}"
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _evaluate(trainer: Trainer, inputs: Inputs, log: RunLog) -> None:
    if inputs.valid_data is None:
        return
    started = time.perf_counter()
    loss = evaluate(trainer.model, inputs.valid_data, trainer.config, trainer.world)
    perplexity = math.exp(min(loss, 700.0))
    step = trainer.progress.step
    took = duration(time.perf_counter() - started)
    log.say(f"evaluation at step {step} | loss {loss:.4f} | perplexity {perplexity:.2f} | took {took}")
    log.metrics("eval", {"step": step, "time": time.time(), "eval_loss": loss, "eval_ppl": perplexity})


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
    )
    try:
        path = save(
            config.run.dir,
            pieces(trainer.optimizer, trainer.model.fp8),
            state,
            config_yaml=config.to_yaml(),
            tokenizer_files=inputs.tokenizer.files,
            keep_last=config.checkpoint.keep_last,
            rank=world.rank,
            world_size=world.layout.world_size,
            agree=world.first_problem,
        )
    except StorageError as error:
        log.event("save_failed", step=progress.step, reason=str(error))
        raise _for_all(world, error) from None
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
    log.say(f"operators   {in_words(config.ops, world.device)}")
    peak = peak_tflops(world.device)
    log.say(f"peak        {f'{peak:.0f} TFLOP/s in bf16' if peak else 'not known for this device, so MFU is n/a'}")
    for data in inputs.train_data.datasets:
        log.say(f"data        {data.prefix}: {data.num_tokens:,} tokens in {data.num_documents:,} documents")
    log.event("layout", world_size=layout.world_size, **asdict(layout), device=str(world.device))


def _for_all(world: World, error: TriaxisError) -> TriaxisError:
    """Mark an error that all ranks raise together, so that it is printed once."""
    error.reported_elsewhere = not world.is_main
    return error


def _record_failure(error: Exception, log: RunLog | None) -> None:
    known = as_triaxis_error(error)
    if log is not None:
        code, advice = (known.exit_code, known.advice) if known else (1, "see the traceback in the log")
        log.event("exit", code=code, reason=str(error), advice=advice)
