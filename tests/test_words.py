"""One vocabulary: terms that were replaced by the field's own, and British spellings, do not come back."""

import ast
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".md", ".sh", ".yaml", ".toml", ".cpp", ".cu", ".cuh", ".h", ".sbatch"}
# Pattern (of whole words) -> what to write instead.
REPLACED = {
    r"Implementation": "NormImpl, AttentionImpl, Fp8MatmulImpl",
    r"turned_values|grad_turned|x_turned|turned=": "transposed",
    r"as it lies": "row-major",
    r"rowwise=|\"squares\"|scaling == \"rows\"": "TENSORWISE, BLOCK_1X128, BLOCK_128X128",
    r"scale_of|_scale_for|_scale_now": "scale_inv, scale",
    r"largest magnitudes? (of the moment|now)|of the moment": "current amax",
    r"Quantised|quantised\w*|dequantised": "QuantizedTensor, quantize, dequantize",
    r"learned (tokens?|places)|tokens? (are|is) learned|learned=": "target tokens",
    r"FP8 products?|products (and|of|in) FP8|own (FP8 )?product|multiplies_in_fp8": "FP8 matmul",
    r"forgotten\(|again\(lambda": "discard_and_recompute, checkpoint",
    r"feeds|of_sum": "next_linear, add_norm",
    r"ends_group|ALONE|counts_batch|gathered_before": "embedding_group, NO_TP, is_model_parallel_leader, ...",
    r"\.embeds|\.predicts|\.decays|\.multiplies": "has_embedding, has_head, weight_decay, counts_in_flops",
    r"Pending|_Nothing": "Work, CompletedWork",
    r"Speaker|\.follow\(\)|\.publish\(\)": "TextGenerator, serve_rank, broadcast_params",
    r"HOPELESS|TOO_MUCH|MOST_RUNAWAYS": "MAX_LEADING_REJECTS, OVER_BUDGET, MAX_OVER_BUDGET",
    r"in_rows|in_words": "packing_summary, describe_ops",
    r"Rejected:": "Alternative considered:",
    r"own (CUDA )?kernels?": "custom kernel",
    r"[Bb]ehaviou?rs? of old|the same command goes on": "rerun the same command to resume",
    r"\w*([Ii]nitialis|[Nn]ormalis|[Qq]uantis|[Ss]erialis|[Oo]ptimis|[Rr]ecognis|[Ss]ynchronis|[Oo]rganis)\w*": "-iz-",
    r"\w*(?:al|el|il|im|it|en|or|et|ard|as|ron|andom|ustom|ummar|inear)is(?:e[drs]?|ing|ations?)(?![a-z])": "-ize",
    r"\w*(?:[Bb]ehavi|[Cc]ol|[Ff]av|[Ff]lav|[Hh]on|[Ll]ab|[Nn]eighb|[Rr]ig)our\w*": "-or",
    r"\w*(?:[Cc]ent|[Mm]et|[Tt]heat)red?(?![a-z])": "-er",
    r"\w*(?:[Aa]rtefact|[Cc]atalogue|[Ll]icence|[Dd]efence|[Jj]udgement|[Pp]rogramme(?!d|r))\w*": "American spelling",
    r"\w*(?:[Aa]naly|[Pp]araly)s(?:e[ds]?|ing)(?![a-z])": "-yze",
    r"\w*(?:[Mm]od|[Ll]ab|[Tt]rav|[Cc]hann|[Ss]ign)(?:[ea]l)l(?:ed|ing)(?![a-z])": "one l, as in modeling",
    r"[Gg]rey|[Ss]pelt|[Ll]earnt|[Bb]urnt|[Ww]hilst|[Aa]mongst": "gray, spelled, learned, burned, while, among",
}  # fmt: skip


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [ROOT / name for name in listed if Path(name).suffix in SUFFIXES and name != "tests/test_words.py"]


@pytest.mark.parametrize("pattern", REPLACED)
def test_replaced_words_are_gone(pattern):
    word = re.compile(rf"(?<![\w]){pattern}" if pattern[0] in "\\" else rf"(?<!\w)(?:{pattern})(?!\w)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if word.search(line)
    ]
    assert not found, "\n".join([f"write {REPLACED[pattern]}:", *found])


def test_a_public_name_has_one_home():
    """A name means one thing; the programs of `engine/cli` have a `main`, a parser, options and examples each."""
    of_every_program = {"main", "parser", "parse_options", "DESCRIPTION", "EXAMPLES"}
    homes: dict[str, list[str]] = defaultdict(list)
    for path in (ROOT / "engine").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            else:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                homes[name].append(str(path.relative_to(ROOT)))
    shared = {
        name: paths for name, paths in homes.items()
        if len(paths) > 1 and not name.startswith("_") and name not in of_every_program
    }  # fmt: skip
    assert not shared
