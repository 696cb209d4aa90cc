"""Top level of a training run: start, loop with hooks, shutdown."""

from contextlib import closing

from engine.checkpoint.run_directory import BEST, checkpoints_dir, step_name
from engine.config.derived import with_steps
from engine.config.schema import Config
from engine.errors import Interrupted, PeerError, as_triaxis_error
from engine.heartbeat import Heartbeat, Position
from engine.parallel.activity import Limits
from engine.parallel.agreement import leave_together, on_all_ranks, run_on_all_ranks
from engine.parallel.layout import init_distributed
from engine.plan.throughput import flops_per_token
from engine.train.evaluate import EarlyStopping, Evaluation, compares_evaluations, stops_early
from engine.train.guard import HANG
from engine.train.hooks import Hook, train_with_hooks
from engine.train.inputs import Inputs, chat_template, open_inputs
from engine.train.log import RunLog
from engine.train.metrics import StepReporter
from engine.train.saving import SaveBest, Saving
from engine.train.signals import StopRequest, end_with_agent
from engine.train.start import arrange_ranks, build_trainer, describe_start, open_log
from engine.train.trainer import Trainer
from engine.train.warm_up import warm_up
from engine.train.watchdog import Watchdog


def train(config: Config, heartbeat: Heartbeat | None = None) -> None:
    """Train on this rank as `config` says.

    Args:
        heartbeat: gives signs of life since the process started; closed at the end. None: a new one.

    Raises:
        TriaxisError: carries the exit code of the failure; `Interrupted` after a stop request.
    """
    with closing(heartbeat or Heartbeat("starting")) as heartbeat:
        _train_on_rank(config, heartbeat)


def _train_on_rank(config: Config, heartbeat: Heartbeat) -> None:
    end_with_agent()
    parallel, heartbeat.phase = config.parallel, "connecting the ranks"
    world = init_distributed(
        config.run.device, timeout_s=parallel.timeout_s, connect_timeout_s=parallel.connect_timeout_s
    )
    trainer: Trainer | None = None
    log: RunLog | None = None
    limits = Limits(None if parallel.hang_s == "auto" else parallel.hang_s, parallel.timeout_s)
    watched = Watchdog(world, limits if parallel.hang_s is not None else None, config.run.dir)
    place = leave_together(world, lambda: trainer.position if trainer else heartbeat.phase)
    with place, watched as watchdog:
        try:
            watchdog.world, reason = arrange_ranks(config, world)
            world = watchdog.world
            heartbeat.phase = "opening tokenizer, data and checkpoints"
            inputs = run_on_all_ranks(world, lambda: open_inputs(config, world))
            config = run_on_all_ranks(world, lambda: with_steps(config, inputs.train_data.num_rows))
            log = run_on_all_ranks(world, lambda: open_log(config, world, chat_template(inputs.train_data), heartbeat))
            describe_start(config, world, inputs, log, reason)
            trainer = build_trainer(config, world, inputs, log)
            heartbeat.follow(lambda: Position(trainer.position, trainer.progress.step, config.train.steps))
            run_on_all_ranks(world, lambda: log.open_metrics(trainer.progress.step, config))
            _train(trainer, inputs, log)
            log.event("exit", code=0)
        except Exception as error:
            if isinstance(error, PeerError) and not error.is_shared:
                watchdog.name_cause(error)
            if world.activity.cause != HANG:  # which the watchdog records
                _record_failure(error, log)
            raise
        finally:
            if log is not None:
                log.close()


def _train(trainer: Trainer, inputs: Inputs, log: RunLog) -> None:
    """Run the loop unless the run is already complete, and log how it ended."""
    config, world = trainer.config, trainer.world
    if reason := _nothing_to_do(trainer):
        log.say(f"nothing to do: {reason}")
        return _say_best(trainer, log)
    warm_up(trainer, log)
    stop = StopRequest()
    try:
        train_with_hooks(trainer, _hooks(trainer, inputs, log), stop)
    except Exception as error:
        lost = as_triaxis_error(error)
        if isinstance(lost, PeerError):
            stop.silence(lost)
            raise lost from error
        raise
    progress = trainer.progress
    if trainer.stopped_by:
        kept = "the state is saved" if progress.step else "nothing to save yet"
        raise on_all_ranks(world, Interrupted(f"stopped by {trainer.stopped_by} after step {progress.step}; {kept}"))
    tokens = f"{progress.tokens:,} {'target ' * (config.task == 'sft')}tokens"
    log.say(f"finished: {progress.step} steps, {tokens}; checkpoint in {config.run.dir}")
    _say_best(trainer, log)


def _nothing_to_do(trainer: Trainer) -> str | None:
    step, train = trainer.progress.step, trainer.config.train
    if stops_early(trainer):
        return f"stopped early at step {step}; to continue, raise train.early_stopping = {train.early_stopping}"
    if step < train.steps:
        return None
    return (
        f"step {step} is done and train.steps = {train.steps}; to continue, raise train.steps; for a new run, choose "
        "another run.dir"
    )


def _hooks(trainer: Trainer, inputs: Inputs, log: RunLog) -> list[tuple[int, Hook]]:
    """List the hooks as (every, hook). Reports come before saves, so that a non-finite state is not saved."""
    config = trainer.config
    evaluations, checkpoints = config.train.eval_interval, config.checkpoint.interval
    reports = [config.log.interval, checkpoints, *([evaluations] if compares_evaluations(config) else [])]
    saving = Saving(trainer, inputs, log)
    return [
        (1, StepReporter(trainer, log, reports, _flops_per_step(config, inputs), inputs.train_data.num_rows)),
        (evaluations, Evaluation(inputs.valid_data, log)),
        (evaluations, SaveBest(saving)),
        (checkpoints, saving),
        (evaluations, EarlyStopping(saving, log)),
    ]


def _flops_per_step(config: Config, inputs: Inputs) -> float:
    """FLOPs of a global batch, without padding."""
    data, places = inputs.train_data, config.batch.global_ * config.data.seq_length
    length = data.mean_length or config.data.seq_length
    return data.efficiency * places * flops_per_token(config.model, inputs.table, length)


def _say_best(trainer: Trainer, log: RunLog) -> None:
    best, root = trainer.best, checkpoints_dir(trainer.config.run.dir)
    if best is not None:
        kept = (root / step_name(best.step)).is_dir()
        where = f"kept as {root / BEST}" if kept else "not kept" + ", see checkpoint.keep_best" * (best.step > 0)
        log.say(f"best: evaluation loss {best.loss:.4f} at step {best.step}, {where}")


def _record_failure(error: Exception, log: RunLog | None) -> None:
    known = as_triaxis_error(error)
    if log is not None:
        code, advice = (known.exit_code, known.advice) if known else (1, "see the traceback in the log")
        log.event("exit", code=code, reason=str(known or error), advice=advice)
