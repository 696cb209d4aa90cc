"""`triaxis train`: train as one rank, or check the run and start the ranks of this node.

A process that torchrun has started is a rank. Otherwise this command starts the ranks itself if there is more than one.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from engine.cli.arguments import Parser, once_per_node
from engine.cli.launch import NodeLaunch, run_node
from engine.cli.settings import config_parser, load_config
from engine.config.schema import Config
from engine.errors import ConfigError, ended_by, run_program
from engine.formatting import counted
from engine.heartbeat import Heartbeat

DESCRIPTION = """Pretrain or fine-tune a model, as `task` in the configuration says: on one process, with --gpus or
--ranks on several of this node, and with --nodes on several nodes. Before it starts ranks, it checks that the
configuration, the data and the memory fit. On SIGTERM the run saves a checkpoint and exits with code 75;
the same command resumes it."""
EXAMPLES = """
examples:
  %(prog)s tiny                                              # one process
  %(prog)s tiny --ranks 2 --parallel.tp 2                    # two processes, on a CPU too
  %(prog)s llama2-7b --gpus 8 --data.tokenizer tokenizer.model --data.train '[{path: data/web_text_document}]'
  %(prog)s llama2-7b --gpus 8 --nodes 4 --node-rank 0 --master-addr node0       # on each node, with its number
  %(prog)s llama2-7b --gpus 8 --dry-run                      # prints the line for torchrun, such as
  torchrun --standalone --nproc-per-node 8 -m engine train llama2-7b
"""


def parser() -> Parser:
    """Create the parser of this command."""
    parser = config_parser("train", DESCRIPTION, EXAMPLES)
    number, add = parser.add_mutually_exclusive_group(), parser.add_argument
    number.add_argument("--ranks", type=int, metavar="N", help="ranks on each node: one per GPU, or processes of a CPU "
        "(default: NPROC_PER_NODE of the environment, else the GPUs, else 1)")  # fmt: skip
    number.add_argument("--gpus", type=int, metavar="N", help="the same, and an error if this node has fewer GPUs")
    add("--nodes", type=int, metavar="N", help="nodes of the run (default: NNODES of the environment, else 1)")
    add("--node-rank", type=int, metavar="R", help="which node this is, from 0 (default: NODE_RANK)")
    add("--master-addr", metavar="HOST", help="of node 0 (default: MASTER_ADDR)")
    add("--master-port", type=int, metavar="PORT", help="a free port of that host (default: MASTER_PORT, else 29500)")
    add("--dry-run", action="store_true", help="check the run, and print a line for torchrun instead of starting ranks")
    return parser


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the command; see `--help`. Returns the exit code of the ranks, None for 0."""
    options, overrides = parser().parse_known_args(arguments)
    with closing(Heartbeat("importing PyTorch")) as heartbeat:
        return _run(options, overrides, heartbeat)


def _run(options: argparse.Namespace, overrides: Sequence[str], heartbeat: Heartbeat) -> int | None:
    is_rank = "LOCAL_RANK" in os.environ
    if is_rank:
        _refuse_launch_options(options)
    config = load_config(options.config, overrides)
    launch = None if is_rank else _launch(options, config)
    if launch is None or (launch.world_size == 1 and not options.dry_run):
        from engine.train.run import train

        train(config, heartbeat)
        return None
    door = [sys.argv[0]] if Path(sys.argv[0]).name == "triaxis" else ["-m", "engine"]  # the same engine/ as here
    program = [*door, "train", options.config, *overrides]
    return _start(launch, config, program, heartbeat, dry_run=options.dry_run)


def _refuse_launch_options(options: argparse.Namespace) -> None:
    """Check that a rank is not told to start ranks.

    Raises:
        ConfigError: it is.
    """
    given = [
        name for name, value in vars(options).items() if name != "config" and value is not None and value is not False
    ]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise once_per_node(
            ConfigError(
                f"{option}: torchrun has started this process as a rank (LOCAL_RANK is set), and its own options say "
                f"how many there are and where; leave out {option}, or start without torchrun"
            )
        )


def _launch(options: argparse.Namespace, config: Config) -> NodeLaunch:
    """The ranks to start: as many as the options say, or as there are GPUs.

    Raises:
        ConfigError: a number is out of range, or there are fewer GPUs than --gpus.
    """
    flag, given = ("--ranks", options.ranks) if options.gpus is None else ("--gpus", options.gpus)
    ranks = _number(given, flag, "NPROC_PER_NODE") or _num_gpus(config) or 1
    if options.gpus is not None:
        _require_gpus(ranks, config)
    nodes = _number(options.nodes, "--nodes", "NNODES") or 1
    place = f" of {counted(nodes, 'node')} (--nodes or NNODES)"
    node_rank = _number(options.node_rank, "--node-rank", "NODE_RANK", range(nodes), place)
    port = _number(options.master_port, "--master-port", "MASTER_PORT", range(1, 65536)) or 29500
    return NodeLaunch(ranks, nodes, node_rank, options.master_addr or os.environ.get("MASTER_ADDR"), port)


def _number(
    option: int | None, flag: str, variable: str, expected: range | None = None, reason: str = ""
) -> int | None:
    """The number given as an option, else in the environment, else None; at least 1 unless another range is expected.

    Raises:
        ConfigError: it is out of range; the message names where it was given.
    """
    text = os.environ.get(variable) if option is None else str(option)
    if text is None:
        return None
    name = f"{flag} {text}" if option is not None else f"{variable} = {text} in the environment"
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(f"{name}: expected a number") from None
    if expected is None and number < 1:
        raise ConfigError(f"{name}: expected at least 1")
    if expected is not None and number not in expected:
        raise ConfigError(f"{name}: expected {expected[0]} to {expected[-1]}{reason}")
    return number


def _require_gpus(number: int, config: Config) -> None:
    if number > (found := _num_gpus(config)):
        why = "run.device = cpu" if config.run.device == "cpu" else f"this machine shows {found} of them"
        raise ConfigError(f"--gpus {number}: {why}; --ranks {number} starts as many ranks on the device of run.device")


def _num_gpus(config: Config) -> int:
    """GPUs of this machine that the run may use."""
    import torch

    return 0 if config.run.device == "cpu" else torch.cuda.device_count()


def _start(
    launch: NodeLaunch, config: Config, program: list[str], heartbeat: Heartbeat, *, dry_run: bool
) -> int | None:
    if not dry_run:
        launch.require_place()
    heartbeat.close()  # from here on the child and then rank 0 give the signs
    if code := _in_a_child(lambda: check_start(config, launch)):
        return code
    print(launch.line(program), file=sys.stdout if dry_run else sys.stderr, flush=True)
    return None if dry_run else run_node(launch, program, config.run.dir)


def _in_a_child(check: Callable[[], None]) -> int:
    """Run `check` in a fork, so that neither a CUDA context nor opened data stay here; return its exit code.

    Raises:
        TriaxisError: a signal has ended it.
    """
    import torch  # noqa: F401 (once, for both processes)

    def with_signs_of_life() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # this process reports an interruption
        with closing(Heartbeat("checking configuration, data and memory")):
            check()

    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        run_program(with_signs_of_life)
    if (code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) < 0:
        raise ended_by("the check before the start", -code)
    return code


def check_start(config: Config, launch: NodeLaunch) -> None:
    """Make the checks of a rank's start once, while there are no ranks.

    Raises:
        TriaxisError: as each rank would.
    """
    from engine.config.derived import with_steps
    from engine.parallel.connect import check_hardware_queues
    from engine.parallel.layout import World, choose_device
    from engine.plan.layouts import choose_layout, require_fit
    from engine.plan.memory import ClusterSpec, available
    from engine.train.inputs import model_dtype, open_inputs

    last = launch.ranks - 1
    device = choose_device(config.run.device, last)
    capacity, dtype = available(device, launch.ranks), model_dtype(config.precision.mode, device.type)
    ranks = ClusterSpec(launch.world_size, launch.ranks, capacity, device.type, dtype)
    layout, _ = choose_layout(config, ranks)
    require_fit(config, layout, ranks)
    check_hardware_queues(launch.environment(), layout.pp, device.type)
    inputs = open_inputs(config, World(layout, launch.world_size - 1, last, launch.ranks, device))
    with_steps(config, inputs.train_data.num_rows)
