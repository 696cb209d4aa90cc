"""The arguments of a Megatron-LM command line: their values and Megatron-LM's defaults.

Defaults are those of megatron/training/arguments.py at d98e8a64 (tests/cli/megatron/defaults.json is its parser's own
list): an argument that is not given has a meaning there, and often another one than here.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from engine.config.foreign import MEGATRON, counterpart
from engine.errors import ConfigError

DEFAULTS: Mapping[str, Any] = MappingProxyType(  # of the arguments that are translated; None and False otherwise
    {
        "rotary_base": 10000, "rotary_percent": 1.0, "rope_scaling_factor": 8.0, "norm_epsilon": 1e-5,
        "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "init_method_std": 0.02,
        "num_query_groups": 1, "softmax_type": "vanilla", "glu_linear_offset": 0.0,
        "hidden_dropout": 0.1, "attention_dropout": 0.1,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
        "fp8_recipe": "delayed", "fp8_amax_history_len": 1, "fp8_amax_compute_algo": "most_recent", "fp8_margin": 0,
        "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1,
        "optimizer": "adam", "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8,
        "clip_grad": 1.0, "min_lr": 0.0, "lr_decay_style": "linear", "lr_wsd_decay_style": "exponential",
        "lr_warmup_iters": 0, "lr_warmup_samples": 0, "lr_warmup_init": 0.0, "weight_decay_incr_style": "constant",
        "expert_model_parallel_size": 1, "empty_unused_memory_level": 0, "timing_log_level": 0,
        "exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32",
        "eval_iters": 100, "log_interval": 100, "num_workers": 2, "seed": 1234,
    }
)  # fmt: skip
DEFAULT_SPLIT = "969,30,1"  # set after parsing, in validate_args


class Arguments:
    """Arguments by name, in underscores; reading one marks it as translated.

    Attributes:
        given: the values of each argument of the command line, the last one of those given twice.
        read: the names that have been read.
        nodes: nodes of the run, if the command line begins with torchrun and its options; else 1.
        gpus: ranks that torchrun starts on each node; None if the command line does not say.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        """Parse `tokens`; a launcher and a script before the arguments are allowed.

        Raises:
            ConfigError: there is no argument, or a value without one.
        """
        scripts = [number for number, token in enumerate(tokens) if token.endswith(".py")]
        start = scripts[0] + 1 if scripts else 0
        self.given, self.read = _by_name(tokens[start:]), set[str]()
        if not self.given:
            raise ConfigError("no arguments of Megatron-LM; expected some, as in --num-layers 32 --hidden-size 4096")
        self.nodes, self.gpus = _launched(tokens[:start])

    def values(self, name: str) -> list[str]:
        """Return the values of a list; empty if it is not given."""
        self.read.add(name)
        return self.given.get(name, [])

    def text(self, name: str) -> Any:
        """Return a value as it is written, or the default."""
        values = self.values(name)
        if name in self.given and len(values) != 1:
            raise ConfigError(f"{flag(name)} {' '.join(values)}: expected one value")
        return values[0] if values else DEFAULTS.get(name)

    def switch(self, name: str) -> bool:
        """Whether a switch is given."""
        self.read.add(name)
        return name in self.given

    def integer(self, name: str) -> Any:
        """Return an integer, or the default."""
        return self._number(name, int)

    def real(self, name: str) -> Any:
        """Return a real number, or the default."""
        return self._number(name, float)

    def required(self, name: str, problems: list[str]) -> int:
        """Return a positive integer; if there is none, add that to `problems` and return 1."""
        value = self.integer(name)
        if value is None or value < 1:
            seen = "missing" if value is None else f"{value} is not positive"
            problems.append(f"{flag(name)}: {seen}; {counterpart(MEGATRON[name]) or 'the run'} needs it")
        return max(value or 1, 1)

    def is_default(self, name: str) -> bool:
        """Whether the value given is Megatron-LM's default."""
        default = DEFAULTS.get(name)
        return default is not None and self.given[name] == [str(default)]

    def shown(self, *names: str) -> str:
        """Format arguments as they were given; those that were not with their default."""
        shown = []
        for name in names:
            values = self.given.get(name)
            value = " ".join(shlex.quote(value) for value in values) if values is not None else DEFAULTS.get(name)
            text = flag(name) + (f" {value}" if value not in (None, "") else "")
            shown.append(text if values is not None else f"{text} (default of Megatron-LM)")
        return ", ".join(shown)

    def _number(self, name: str, kind: type[int] | type[float]) -> Any:
        value = self.text(name)
        if value is None:
            return None
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := kind(value)):
                return number
        raise ConfigError(f"{flag(name)} {value}: expected {'an integer' if kind is int else 'a number'}")


def flag(name: str) -> str:
    """Return the name as it is typed."""
    return f"--{name.replace('_', '-')}"


def _by_name(tokens: Sequence[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            values = given[name.replace("-", "_")] = [value] if equals else []
        elif values is None:
            raise ConfigError(f"{token!r} is not an argument of Megatron-LM; expected --NAME VALUE")
        else:
            values.append(token)
    return given


def _launched(launcher: Sequence[str]) -> tuple[int, int | None]:
    """The nodes and the GPUs of each that options of torchrun say; None if they do not."""
    words = [word for token in launcher for word in token.replace("-", "_").lstrip("_").split("=")]
    options = dict(pairwise(words))
    per_node, nodes = options.get("nproc_per_node", ""), options.get("nnodes", "1")
    known = per_node.isdecimal() and nodes.isdecimal()
    return (int(nodes), int(per_node)) if known else (1, None)
