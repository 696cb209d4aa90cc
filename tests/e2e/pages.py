"""Reads the fenced blocks of a page, and runs its commands as its reader would: in order, in one shell."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"( *)```(\w*)$")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
TIMEOUT_S = 600  # for a page


@dataclass(frozen=True)
class Block:
    """A fenced block. `not_run` is the reason that the line before it gives why its commands cannot run."""

    line: int
    language: str
    text: str
    not_run: str | None = None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, those in lists included."""
    found, lines, number = [], page.split("\n"), 0
    while number < len(lines):
        if fence := FENCE.match(lines[number]):
            indent, language = fence.groups()
            end = lines.index(f"{indent}```", number + 1)
            text = "".join(line.removeprefix(indent) + "\n" for line in lines[number + 1 : end])
            reason = NOT_RUN.fullmatch(lines[number - 1].strip()) if number else None
            found.append(Block(number + 1, language, text, reason and reason[1]))
            number = end
        number += 1
    return found


def executed(page: str) -> list[Block]:
    """The blocks whose commands run."""
    return [block for block in blocks(page) if block.language == "sh" and block.not_run is None]


def run_blocks(of_page: list[Block], home: Path, environment: Mapping[str, str]) -> str:
    """Run blocks in one shell in the directory `home`, until a command fails; return what they print."""
    script = "set -eo pipefail\n"
    for block in of_page:
        script += f"printf -- '--- line {block.line}, after %s s\\n' $SECONDS\n{block.text}"
    command = ["bash", "--noprofile", "--norc", "-c", script]
    process = subprocess.Popen(command, cwd=home, env=environment, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        said += f"\nkilled after {TIMEOUT_S} s"
    assert process.returncode == 0, said
    return said
