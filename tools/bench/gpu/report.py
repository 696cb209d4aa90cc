"""Writes what a run has measured: the tables of docs/measurements.md, and the changes since an earlier run.

python -m tools.bench.gpu.report --results runs/gpu [--into docs/measurements.md] [--against DIR]
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.schema import ModelConfig
from engine.errors import run_program
from engine.model.families import PRESETS
from tools.bench.gpu.bound import ATTENTION, Limits, Work, bound, limits_of
from tools.bench.gpu.compare import Documents, changes, read, rows_of
from tools.bench.gpu.stages import WholeStep, step_row, whole_steps
from tools.bench.kernel_table import BEGIN, END, section, write_between_markers
from tools.bench.step_profile import LATE_US, PARTS, parts

BEGIN_STEPS, END_STEPS = "<!-- steps: written by tools/bench/gpu -->", "<!-- steps: end -->"
NOT_RUN = "not run"
OTHERS = ("transformers", "transformers-compiled", "transformers-liger")
OTHERS_KEYS = {"calls", "forward_tflops", "candidates", "overlap"}  # of rows of bursts, attention, algorithms, ranks
TARGETED, SEQ_LENGTH = "llama2-7b", 4096


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="of a run")
    parser.add_argument("--into", type=Path, metavar="FILE", help="document with the markers of the tables")
    parser.add_argument("--against", type=Path, metavar="PATH", help="results of an earlier run: a folder or a file")
    parser.add_argument("--preset", default="llama2-7b", help="that was measured")
    options = parser.parse_args(arguments)
    documents = read(options.results)
    kernels, steps = _kernel_section(documents), steps_section(documents, options.preset)
    page = options.into or options.results / "report.md"
    if options.into is None:
        page.write_text(f"# Results\n\n{BEGIN}\n{END}\n\n{BEGIN_STEPS}\n{END_STEPS}\n", encoding="utf-8")
    write_between_markers(page, kernels)
    write_between_markers(page, steps, BEGIN_STEPS, END_STEPS)
    print(f"{steps}\n\ntables: {page}")
    if options.against is not None:
        print(f"\nsince {options.against}:")
        print("\n".join(changes(read(options.against), documents)))


def _kernel_section(documents: Documents) -> str:
    """The table of kernels, from the stages that ran rows of it."""
    chosen = [document for name, document in documents.items() if name.startswith("kernels") and document["machine"]]
    merged = {name: row for document in chosen for name, row in document["rows"].items()}
    return section([{"machine": chosen[0]["machine"], "rows": merged}] if chosen else [])


def steps_section(documents: Documents, preset: str) -> str:
    """Whole steps, and the parts of those that were profiled beside their bounds, in Markdown."""
    machines = [document["machine"] for document in documents.values() if document["machine"].get("gpu")]
    names = dict.fromkeys(f"{machine['gpu']}, torch {machine['torch']}, {machine['commit']}" for machine in machines)
    lines = [f"`bash tools/bench/gpu.sh` ({'; '.join(names) or NOT_RUN}).", "", *_steps_table(documents, preset)]
    for step in whole_steps():
        profile = rows_of(documents).get(f"{step_row(step, preset)}, profile")
        if profile is not None:
            lines += ["", *_parts_table(documents, step, preset, profile)]
    lines += ["", *_others_table(documents)]
    return "\n".join(lines)


def _steps_table(documents: Documents, preset: str) -> Iterator[str]:
    found, columns = (
        rows_of(documents),
        f"| whole step of {preset} | settings | target | tokens/s | range | bound | MFU ",
    )
    others = [found.get(f"{preset} {name}, whole step", {}).get("value") for name in OTHERS]
    yield f"{columns}| GiB | MHz | W | beside transformers eager / compiled / with Liger |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for step in whole_steps():
        row = found.get(step_row(step, preset))
        target = "" if step.target is None or preset != TARGETED else f"{step.target:,.0f}"
        if row is None:
            yield _line([step.name, "", target, _why(documents, step), *[""] * 7])
            continue
        low, high = row["range"]
        cells = [step.name, row["settings"], target, f"**{row['value']:,.0f}**", f"{low:,.0f} – {high:,.0f}"]
        at_best = _bound(documents, step, preset, row["tokens"]) if "tokens" in row else None
        cells += [
            f"{at_best.tokens / sum(at_best.seconds.values()):,.0f}" if at_best else "",
            _cell(row["mfu"], ".1%"),
            _cell(row["peak_gib"], ",.0f"),
        ]
        ratios = [f"{row['value'] / other:.2f}×" if other else "–" for other in others]
        yield _line([*cells, *_power(row), " / ".join(ratios) if any(others) else ""])


def _line(cells: Sequence[str]) -> str:
    return re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(cells)} |")


def _power(row: dict[str, Any]) -> list[str]:
    """Format the median clock and power."""
    power = row.get("power", {})
    return [f"{power[name][1]:,.0f}" if name in power else "" for name in ("sm_mhz", "watts")]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _why(documents: Documents, step: WholeStep) -> str:
    stage = documents.get(step.stage_name, {}).get("stage", {})
    return f"{NOT_RUN}: {stage['problem']}" if stage.get("problem") else NOT_RUN


@dataclass(frozen=True)
class Bound:
    """The bound of a step of `tokens`: seconds of its parts at these limits, which are from `origin`."""

    tokens: int
    seconds: dict[str, float]
    limits: Limits
    origin: str


def _bound(documents: Documents, step: WholeStep, preset: str, tokens: int) -> Bound | None:
    """Compute the bound of a profiled step for so many tokens; None if limits are missing, or it is not ours."""
    found = rows_of(documents)
    profile = found.get(f"{step_row(step, preset)}, profile")
    if profile is None or "transformers" in step.name:
        return None
    settings, length = found[step_row(step, preset)]["settings"], min(SEQ_LENGTH, tokens)
    microbatches = max(1, tokens // length // (2 if "--batch.micro 2" in settings else 1))
    moments = "--optimizer.moments bf16" in settings
    work = Work(ModelConfig(**PRESETS[preset]), tokens, length, microbatches, step.precision, moments)
    limits, origin = limits_of(found, work, profile, found.get(f"{preset} bf16, whole step, profile"))
    needed = {step.precision, "bf16", *(f"attention, {way}" for way in ATTENTION)}
    if not needed <= limits.keys() or not limits["copy"]:
        return None
    return Bound(tokens, bound(work, limits), {name: limits[name] for name in (*sorted(needed), "copy")}, origin)


def _parts_table(documents: Documents, step: WholeStep, preset: str, profile: dict[str, Any]) -> Iterator[str]:
    spent, wall_ms = parts(profile["kernels"]), profile["wall_us"] / 1e3
    at_best = _bound(documents, step, preset, profile["tokens"])
    launches = sum(count for _, count in spent.values())
    yield f"{step.name}, profiled: {profile['tokens']:,} tokens in {wall_ms:,.0f} ms, of which the device was busy for"
    yield f"{profile['busy']:.1%}. {'' if at_best is None else _limits(at_best)}".rstrip()
    yield f"\n| {step.name} | ms | launches | bound, ms |\n|---|---|---|---|"
    for part in PARTS:
        if part in spent or (at_best and part in at_best.seconds):
            ms, count = spent.get(part, (0.0, 0))
            limit = NOT_RUN if at_best is None else f"{at_best.seconds.get(part, 0) * 1e3:,.1f}"
            yield f"| {part} | {ms:,.1f} | {count:,} | {limit} |"
    gaps = profile.get("gaps")
    late = f", of which gaps above {LATE_US:g} µs {gaps['late_us'] / 1e3:,.1f} ms" if gaps else ""
    yield f"| idle{late} | {(1 - profile['busy']) * wall_ms:,.1f} | | {NOT_RUN if at_best is None else '0.0'} |"
    total = NOT_RUN if at_best is None else f"**{sum(at_best.seconds.values()) * 1e3:,.0f}**"
    yield f"| **all** | **{wall_ms:,.0f}** | **{launches:,}** | {total} |"


def _limits(at_best: Bound) -> str:
    units = {"copy": (".2f", "TB/s")}
    said = [
        f"{name} {value:{form}} {unit}"
        for name, value in at_best.limits.items()
        for form, unit in [units.get(name, (",.0f", "TFLOP/s"))]
    ]
    return f"Limits: {'; '.join(said)} ({at_best.origin})."


def _others_table(documents: Documents) -> Iterator[str]:
    """Bursts, attention, algorithms of FP8 matmuls, hidden communication and the time on the host."""
    yield "| what | this run | MHz | W |\n|---|---|---|---|"
    shown = 0
    for name, row in rows_of(documents).items():
        if OTHERS_KEYS & row.keys() or "time on the host" in name:
            shown += 1
            value = f"{row['step_s'] * 1e3:,.0f} ms a step" if "step_s" in row else f"{row['value']:,.4g} {row['unit']}"
            yield _line([name, value, *_power(row)])
    if not shown:
        yield f"| bursts, attention, FP8 algorithms, hidden communication, time on the host | {NOT_RUN} | | |"


if __name__ == "__main__":
    run_program(main)
    sys.exit()
