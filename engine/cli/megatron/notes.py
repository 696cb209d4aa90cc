"""What the reader of a translated configuration must know."""

from dataclasses import dataclass, field

from engine.cli.megatron.arguments import Arguments, flag
from engine.config.foreign import MEGATRON, explain
from engine.formatting import counted, did_you_mean

_LEFT_TO_SET = {"pipeline_model_parallel_layout", "finetune", "no_load_optim", "no_load_rng", "save_retain_interval"}
_CHANGE_TRAINING = {
    "eod_mask_loss", "fim_data", "decoupled_lr", "decoupled_min_lr", "start_weight_decay", "end_weight_decay",
    "weight_decay_incr_style",
}  # fmt: skip


@dataclass
class Notes:
    """Remarks on a translation, each a line: first the argument, then what about it.

    Attributes:
        refused: arguments that make another model or another kind of run; there is no translation if there is one.
        todo: what the arguments do not say, for the reader to set.
        changed: arguments whose effect on the training is another one here.
        left_out: arguments without a counterpart, which do not change the result.
        implied: arguments that need no setting.
        unknown: arguments that the table of `engine/config/foreign.py` does not have.
    """

    refused: list[str] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    implied: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add_rest(self, arguments: Arguments) -> None:
        """Add the arguments that no part of the translation has read, grouped by what is to be said about them."""
        by_answer: dict[tuple[str | None, str], list[str]] = {}
        for name in arguments.given:
            if name not in arguments.read:
                answer = "the default, and so it is here" if arguments.is_default(name) else explain(name)
                similar = (
                    did_you_mean(flag(name), (flag(one) for one in MEGATRON if "*" not in one))
                    if answer is None
                    else ""
                )
                by_answer.setdefault((answer, _section(name, answer)), []).append(arguments.shown(name) + similar)
        for (answer, section), shown in by_answer.items():
            if answer is None:
                self.unknown += shown
                self.todo.append(f"{counted(len(shown), 'argument')} not known to this command, listed below")
            else:
                getattr(self, section).append(f"{', '.join(shown)}: {answer.removeprefix('use ')}")


def _section(name: str, answer: str | None) -> str:
    """The list of `Notes` for an argument that no part of the translation has read."""
    is_default = answer is not None and answer.startswith("the default")
    if name in _LEFT_TO_SET and not is_default:
        return "todo"
    if name in _CHANGE_TRAINING and not is_default:
        return "changed"
    return "left_out" if answer is not None and answer.startswith("not ") else "implied"
