"""Generate multiple-choice questions for a model trained on Python: which of four lines comes next?

    python examples/evaluation/next_line.py

Each question shows some lines of a module of the standard library; the right answer is the next line, and the wrong
ones are that line with two of its words swapped, so that all are equally long. The modules are the validation data of
examples/quickstart.sh (the last 5 % of its corpus), so that no answer can be memorized. The same corpus gives the same
questions.
"""

import argparse
import json
import re
from pathlib import Path
from random import Random

SHOWN_LINES = 4
CHOICES = 4
WORD = re.compile(r"\w+|[^\w\s]+")
HELD_OUT = 0.05  # as in `split` of examples/configs/quickstart.yaml


def main() -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", type=Path, default=Path("data/quickstart/stdlib.jsonl"), metavar="FILE",
        help="the quickstart's corpus, of which the end was held out (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, default=Path("data/evaluation/next_line.jsonl"), metavar="FILE",
        help="output file, overwritten (default: %(default)s)")  # fmt: skip
    add("--questions", type=int, default=1000, metavar="N", help="maximum number of questions (default: %(default)s)")
    options = parser.parse_args()
    if not options.corpus.exists():
        parser.error(f"--corpus {options.corpus} does not exist; `bash examples/quickstart.sh` creates it")
    with options.corpus.open(encoding="utf-8") as file:
        modules = [json.loads(line)["text"].splitlines() for line in file]
    held_out = modules[-max(1, int(len(modules) * HELD_OUT)) :]
    places = [(module, i) for module in held_out for i in range(SHOWN_LINES, len(module)) if is_code(module[i])]
    random = Random(0)
    random.shuffle(places)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", encoding="utf-8") as file:
        for module, i in places[: options.questions]:
            file.write(json.dumps(question(module, i, random)) + "\n")
    print(f"{min(options.questions, len(places))} questions from {len(held_out)} modules -> {options.output}")


def question(module: list[str], i: int, random: Random) -> dict[str, object]:
    """Build a question: context, choices, and the index of the right choice."""
    right = module[i]
    choices = [right]
    while len(choices) < CHOICES:
        if (other := exchanged(right, random)) not in choices:
            choices.append(other)
    random.shuffle(choices)
    context = "\n".join(module[i - SHOWN_LINES : i]) + "\n"
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def exchanged(line: str, random: Random) -> str:
    """Return the line with two of its words swapped."""
    words = WORD.findall(line)
    i, j = random.sample(range(len(words)), 2)
    words[i], words[j] = words[j], words[i]
    rest = iter(words)
    return WORD.sub(lambda _: next(rest), line)


def is_code(line: str) -> bool:
    """Whether a line has enough different words and is not a comment."""
    return len(set(WORD.findall(line))) >= 5 and not line.lstrip().startswith("#")


if __name__ == "__main__":
    main()
