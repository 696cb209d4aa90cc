"""What ranks communicated, as values: the records that `recorded.py` makes, the rules they are held against, a
simulator that finds deadlocks, and the bytes of each axis.

A record is the program of one rank as the host ran it: groups made, operations launched, waits, operators computed.
Everything here is pure and knows neither processes nor tensors. Alternative considered: checking while recording, which
could not compare ranks that run one after another.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A communicator.

    Attributes:
        name: PyTorch's name of the group; all members must have the same.
        axis: "world", "control", "dp", "tp", "kv", "tied_embedding", or a channel of `CHANNELS`.
        ranks: global ranks, in group order.
    """

    name: str
    axis: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class NewGroup:
    """The rank took part in making `group`."""

    group: Group


@dataclass(frozen=True)
class Launch:
    """An operation given to a communicator; on NCCL a kernel on the communicator's own stream.

    Attributes:
        number: of this launch on its rank, from 0.
        kind: "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "barrier", "send" or "recv".
        detail: what else must be equal on all members, such as the reduction ("sum", "max") or the source.
        shape: of the tensor the members must agree on: the gathered output, the scattered input, the message.
        nbytes: of that tensor.
        peer: the other global rank of a send or receive.
        message: what a send or receive carries, such as "F3.1": the action that needs it.
        caller: the engine's file, line and function that launched it.
    """

    number: int
    kind: str
    group: Group
    detail: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    peer: int | None
    message: str | None
    caller: str


@dataclass(frozen=True)
class Wait:
    """The compute stream (on a CPU or in the control group, the host) waits for a launch of this rank."""

    number: int
    caller: str


@dataclass(frozen=True)
class Compute:
    """Operators launched on the compute stream since the event before."""

    count: int


@dataclass(frozen=True)
class HostSync:
    """The host waits for the device: `.item()`, a synchronous copy, `torch.cuda.synchronize`."""

    caller: str


Event = NewGroup | Launch | Wait | Compute | HostSync


@dataclass(frozen=True)
class Record:
    """The program of one rank, and what was found wrong while it was recorded (memory touched under way)."""

    rank: int
    events: tuple[Event, ...]
    problems: tuple[str, ...] = ()
