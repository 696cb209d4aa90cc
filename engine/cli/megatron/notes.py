"""What the reader of a translated configuration must know."""

from dataclasses import dataclass, field

from engine.cli.megatron.arguments import Arguments, flag
from engine.config.foreign import MEGATRON, explain
from engine.formatting import counted, did_you_mean


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
        by_answer: dict[str | None, list[str]] = {}
        for name in arguments.given:
            if name not in arguments.read:
                answer = "the default, and so it is here" if arguments.is_default(name) else explain(name)
                similar = (
                    did_you_mean(flag(name), (flag(one) for one in MEGATRON if "*" not in one))
                    if answer is None
                    else ""
                )
                by_answer.setdefault(answer, []).append(arguments.shown(name) + similar)
        for answer, shown in by_answer.items():
            if answer is None:
                self.unknown += shown
                self.todo.append(f"{counted(len(shown), 'argument')} not known to this command, listed below")
            elif answer.startswith("not "):
                self.left_out.append(f"{', '.join(shown)}: {answer}")
            else:
                self.implied.append(f"{', '.join(shown)}: {answer.removeprefix('use ')}")
