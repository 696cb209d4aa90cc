"""The proof that a pipeline schedule runs: nothing is missing, and no message can hang.

`check_schedule` holds the actions and their messages against the rules of communication, without tensors or processes.
It runs the programs of all stages with every send and every receive blocking where it is launched: a program that ends
so ends on any device, however many kernels of it overlap and wherever a host waits for its device (see `program.py`).
The executor runs the very programs that were proven. Alternative considered: trusting the functions that build
schedules; a wrong order would show up as a hang of the cluster.

A channel is (sending stage, receiving stage, forward or backward). Its messages arrive in the order they were sent.
"""

from collections import Counter

from engine.parallel.pipeline.program import Program, Step, StepKind, build_program
from engine.parallel.pipeline.schedules import FORWARD_ONLY, Action, ActionKind, Schedule, ScheduleError, deadlock

Channel = tuple[int, int, bool]  # sending stage, receiving stage, whether it carries forwards


def check_schedule(schedule: Schedule) -> Program:
    """Prove that `schedule` runs to its end and computes everything once; return the programs that were proven.

    Every stage does every action exactly once, and in an order that its own results allow; no action waits for ever for
    another stage; no message can hang (`check_program`).

    Raises:
        ScheduleError: names the stage, the action and the reason.
    """
    assert len(schedule.actions) == schedule.num_stages
    for stage in range(schedule.num_stages):
        _check_complete(schedule, stage)
        _check_order(schedule, stage)
    program = build_program(schedule)
    check_program(program)
    return program


def check_program(program: Program) -> None:
    """Prove that every posted receive ends, whatever any stage does next.

    Every stage computes the actions of the schedule in their order, posts one receive for each message that an action
    needs, before that action, and sends each result right after computing it. Run with every send and receive blocking
    until the other stage has launched its side, all stages reach their end, and each receive gets its own message.

    Raises:
        ScheduleError: names the stage, the action and the reason.
    """
    for stage in range(program.schedule.num_stages):
        _check_messages(program, stage)
    _run_blocking(program)


def _check_complete(schedule: Schedule, stage: int) -> None:
    """Nothing unknown, nothing twice, nothing missing, nothing too much."""
    counts = Counter(schedule.actions[stage])
    last, last_chunk = schedule.num_microbatches - 1, schedule.num_chunks - 1
    for action, count in counts.items():
        if not (0 <= action.microbatch <= last and 0 <= action.chunk <= last_chunk):
            raise ScheduleError(
                schedule, stage, action, f"unknown; microbatches are 0 to {last}, chunks 0 to {last_chunk}"
            )
        if count > 1:
            raise ScheduleError(schedule, stage, action, f"done {count} times")
    wanted = _wanted(schedule, counts)
    for action in wanted:
        if action not in counts:
            raise ScheduleError(schedule, stage, action, "missing")
    if extra := counts.keys() - set(wanted):
        reason = f"one too many; a backward is either B, or I and W, and {FORWARD_ONLY} has none"
        raise ScheduleError(schedule, stage, min(extra, key=str), reason)


def _wanted(schedule: Schedule, counts: Counter[Action]) -> list[Action]:
    """What a stage has to do, given which of its backwards it splits."""
    wanted = []
    for microbatch in range(schedule.num_microbatches):
        for chunk in range(schedule.num_chunks):
            parts = [
                Action(kind, microbatch, chunk) for kind in (ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
            ]
            backward = (
                parts if any(part in counts for part in parts) else [Action(ActionKind.BACKWARD, microbatch, chunk)]
            )
            wanted += [Action(ActionKind.FORWARD, microbatch, chunk), *(backward if schedule.trains else ())]
    return wanted


def _check_order(schedule: Schedule, stage: int) -> None:
    """Backward after forward, and weight gradients after input gradients."""
    needs = {
        ActionKind.BACKWARD: ActionKind.FORWARD,
        ActionKind.BACKWARD_INPUT: ActionKind.FORWARD,
        ActionKind.BACKWARD_WEIGHT: ActionKind.BACKWARD_INPUT,
    }
    done = set()
    for action in schedule.actions[stage]:
        if action.kind in needs:
            needed = Action(needs[action.kind], action.microbatch, action.chunk)
            if needed not in done:
                raise ScheduleError(schedule, stage, action, f"comes before {needed}, which it needs")
        done.add(action)


def _check_messages(program: Program, stage: int) -> None:
    """Actions in their order, each receive once and in time, each send directly after its action."""
    schedule, steps = program.schedule, program.steps[stage]
    computed = [step.action for step in steps if step.kind is StepKind.COMPUTE]
    assert computed == list(schedule.actions[stage]), f"stage {stage} computes other actions than its schedule has"
    posted: set[Action] = set()
    for before, step, after in zip((None, *steps), steps, (*steps[1:], None), strict=False):
        if step.kind is StepKind.RECEIVE:
            if step.action in posted or _channel(program, stage, step) is None:
                raise ScheduleError(schedule, stage, step.action, "a receive of a message that does not exist")
            posted.add(step.action)
        elif step.kind is StepKind.SEND:
            if before != Step(StepKind.COMPUTE, step.action):
                raise ScheduleError(schedule, stage, step.action, "its result is not sent right after it")
        else:
            if _channel(program, stage, Step(StepKind.RECEIVE, step.action)) and step.action not in posted:
                raise ScheduleError(schedule, stage, step.action, "its receive is not posted before it")
            send = Step(StepKind.SEND, step.action)
            if (after == send) != (_channel(program, stage, send) is not None):
                raise ScheduleError(schedule, stage, step.action, "its result is not sent where it is needed")


def _channel(program: Program, stage: int, step: Step) -> Channel | None:
    """The channel of a send or receive; None for a computation, and where the message stays on its stage."""
    if step.kind is StepKind.COMPUTE:
        return None
    receives = step.kind is StepKind.RECEIVE
    end = (program.schedule.source if receives else program.schedule.target)(stage, step.action)
    if end is None or end[0] == stage:
        return None
    return (end[0] if receives else stage, stage if receives else end[0], step.action.kind is ActionKind.FORWARD)


def _run_blocking(program: Program) -> None:
    """Take the messages of every stage in turn; a send and its receive are taken together."""
    messages = [
        [(step, channel) for step in steps if (channel := _channel(program, stage, step))]
        for stage, steps in enumerate(program.steps)
    ]
    done = [0] * len(messages)
    waits: dict[int, tuple[Action, str, int]] = {}
    moved = set(range(len(messages)))
    while moved:
        stage = moved.pop()
        waits.pop(stage, None)
        if done[stage] == len(messages[stage]):
            continue
        step, channel = messages[stage][done[stage]]
        sends = step.kind is StepKind.SEND
        other = channel[1] if sends else channel[0]
        if done[other] < len(messages[other]) and messages[other][done[other]][1] == channel:
            there = messages[other][done[other]][0]
            _check_pair(program.schedule, channel, *((step, there) if sends else (there, step)))
            done[stage] += 1
            done[other] += 1
            moved |= {stage, other}
        else:
            waits[stage] = (step.action, "sends its result to" if sends else "receives from", other)
    if waits:
        raise deadlock(program.schedule, waits)


def _check_pair(schedule: Schedule, channel: Channel, send: Step, receive: Step) -> None:
    sent, needed = send.action, receive.action
    target = schedule.target(channel[0], sent)
    assert target is not None
    if (sent.microbatch, target[1]) != (needed.microbatch, needed.chunk):
        reason = f"its receive is posted where stage {channel[0]} sends the result of {sent}"
        raise ScheduleError(schedule, channel[1], needed, reason)
