"""The bound of a training step on one GPU: every part at the limit of the card, FLOPs or bytes, whichever takes longer.

The limits are measured, and read from the results of a run: the longest of the runs of `sustained.py`, the fastest
copy, and the fastest attention. Where one has not run, the rate that the profiled step itself reached stands for it.
The parts are those of `step_profile.PARTS`; one without work of its own, such as gaps or additions that kernels can do
along the way, has the bound 0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.schema import ModelConfig
from tools.bench.kernel_table import key, rows
from tools.bench.step_profile import parts

FORWARD, WEIGHTS = "matmuls, forward and input gradient", "matmuls, weight gradient"
ATTENTION = {"forward": 1.0, "backward": 2.5}  # matmuls, relative to forward
Profile = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Any]]
Limits = Mapping[str, float]
"""TFLOP/s of "bf16", "delayed", "tensorwise", "blockwise" matmuls and of attention each way; TB/s of "copy"."""


@dataclass(frozen=True)
class Work:
    """A step: `tokens` in sequences of `seq_length`, in `microbatches`; `precision` is bf16 or an FP8 recipe."""

    model: ModelConfig
    tokens: int
    seq_length: int
    microbatches: int
    precision: str
    bf16_moments: bool

    @property
    def layers(self) -> int:
        """Parameters in the matmuls of the layers."""
        m = self.model
        attention = m.hidden_size * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
        return m.num_layers * (attention + 3 * m.hidden_size * m.intermediate_size)

    @property
    def head(self) -> int:
        """Parameters in the output projection."""
        return self.model.hidden_size * self.model.vocab_size


def bound(work: Work, limits: Limits) -> dict[str, float]:
    """Return the seconds of each part at the limits."""
    copy = limits["copy"] * 1e12
    rates = {"layers": limits[work.precision] * 1e12, "head": limits["bf16"] * 1e12}
    sizes = {"layers": work.layers, "head": work.head}
    found = dict.fromkeys((FORWARD, WEIGHTS), 0.0)
    for name, size in sizes.items():
        found[FORWARD] += 4 * work.tokens * size / rates[name]
        accumulated = 8 * size * work.microbatches / copy  # fp32 gradients are read and written
        found[WEIGHTS] += max(2 * work.tokens * size / rates[name], accumulated)
    for way, factor in ATTENTION.items():
        flops = factor * 2 * work.tokens * work.seq_length * work.model.num_heads * work.model.head_dim
        found[f"attention, {way}"] = work.model.num_layers * flops / limits[f"attention, {way}"] / 1e12
    return found | {part: moved / copy for part, moved in _bytes(work)}


def _bytes(work: Work) -> Iterator[tuple[str, float]]:
    """Yield the bytes of parts that compute little. Activations and their gradients have 2 bytes an element."""
    m, tokens = work.model, work.tokens
    hidden, heads = 2 * m.hidden_size * tokens, 2 * (m.num_heads + m.num_kv_heads) * m.head_dim * tokens
    ffn, parameters = 2 * m.intermediate_size * tokens, work.layers + work.head * (1 if m.tie_embeddings else 2)
    norms = 2 * m.num_layers + 1
    yield "norm forward", 4 * norms * hidden
    yield "norm backward", 4 * norms * hidden
    yield "SwiGLU forward", 3 * m.num_layers * ffn
    yield "SwiGLU backward", 5 * m.num_layers * ffn
    yield "RoPE", 2 * 2 * m.num_layers * heads
    yield "cross-entropy", 3 * 2 * m.vocab_size * tokens
    yield "AdamW", (22 if work.bf16_moments else 30) * parameters
    yield "gradient norm", 4 * parameters
    yield "embedding", 2 * hidden + hidden + 4 * hidden  # forward; the gradient is read, and added to fp32 rows
    if work.precision != "bf16":
        # what no kernel of ours makes (attention's output, the gradients of its values) or is needed in bf16 as well
        # (the gradient of the residual, twice) is read in bf16 and written twice in FP8; weights are once a step
        unfused = 2 * (m.num_heads + m.num_kv_heads) * m.head_dim * tokens + 2 * hidden
        yield "quantize", 2 * m.num_layers * unfused + 4 * work.layers


def limits_of(all_rows: Rows, work: Work, profile: Profile, bf16_profile: Profile | None) -> tuple[Limits, str]:
    """Return the limits of the card and where they are from.

    Args:
        all_rows: the results of a run.
        profile: of the step, whose rates stand for limits that were not measured.
        bf16_profile: of the step in bf16, whose rate stands for that of the output projection in an FP8 step.
    """
    measured = _sustained(all_rows) | _attention(all_rows)
    bf16 = {} if bf16_profile is None else _bf16_rate(work, bf16_profile)
    reached = bf16 | _reached(work, profile, {**bf16, **measured}.get("bf16"))
    copies = [measured.get("copy", 0.0), *_copies(all_rows)]
    missing = sorted(reached.keys() - measured.keys())
    origin = f"{'; '.join(missing)}: as in this profile" if missing else "all measured in this run"
    return {**reached, **measured, "copy": max(copies)}, origin


def _sustained(all_rows: Rows) -> dict[str, float]:
    names = {"bf16 matmul": ("bf16",), "FP8 tensorwise": ("tensorwise", "delayed"), "FP8 blockwise": ("blockwise",)}
    names["device copy,"] = ("copy",)
    found: dict[str, float] = {}
    for prefix, limits in names.items():
        runs = [row for name, row in all_rows.items() if name.startswith(prefix) and "calls" in row]
        if runs:
            found |= dict.fromkeys(limits, float(max(runs, key=lambda row: row["seconds"])["value"]))
    return found


def _attention(all_rows: Rows) -> dict[str, float]:
    found: dict[str, float] = {}
    for way in ATTENTION:
        rates = [row[f"{way}_tflops"] for row in all_rows.values() if f"{way}_tflops" in row]
        found |= {f"attention, {way}": max(rates)} if rates else {}
    return found


def _copies(all_rows: Rows) -> Iterator[float]:
    """Yield the TB/s of the copies beside the rows of kernels."""
    yield from (row.work / all_rows[key(row)]["copy"] / 1e12 for row in rows() if "copy" in all_rows.get(key(row), {}))


def _bf16_rate(work: Work, profile: Profile) -> dict[str, float]:
    """Return the TFLOP/s of the matmuls in a profile of the step in bf16, if it has any."""
    flops, seconds = 6 * profile["tokens"] * (work.layers + work.head), _matmul_seconds(profile)
    return {"bf16": flops / seconds / 1e12} if seconds else {}


def _matmul_seconds(profile: Profile) -> float:
    ms = parts(profile["kernels"])
    return sum(ms[part][0] for part in (FORWARD, WEIGHTS) if part in ms) / 1e3


def _reached(work: Work, profile: Profile, bf16: float | None) -> dict[str, float]:
    """Return the rates of matmuls and attention in a profile; that of FP8 without the output projection, in bf16."""
    seconds, tokens = _matmul_seconds(profile), profile["tokens"]
    found: dict[str, float] = {}
    if work.precision != "bf16" and seconds and bf16 is not None:
        in_fp8 = seconds - 6 * tokens * work.head / bf16 / 1e12
        found[work.precision] = 6 * tokens * work.layers / in_fp8 / 1e12
    attention = 2 * tokens * work.seq_length * work.model.num_heads * work.model.head_dim * work.model.num_layers
    for way, factor in ATTENTION.items():
        if spent := parts(profile["kernels"]).get(f"attention, {way}"):
            found[f"attention, {way}"] = factor * attention / spent[0] / 1e9
    return found
