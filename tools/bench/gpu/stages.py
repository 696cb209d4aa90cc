"""The stages of a run on a GPU, in the order of what they decide: first whether results are right, then how fast.

A stage is a command that measures for at most `LIMIT_S` seconds and writes the file that `--json` names after every
row. What a stage needs and a machine lacks is found out once (environment.py), so that it costs no time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.kernel_table import key, rows

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 180
TRAINING_TESTS = ("test_claims", "test_engine", "test_training")  # take longer
REHEARSAL_S = 10  # of a step of the tiny model
RANK_TESTS = 4  # parts of tests/gpu/test_ranks.py, whose tests start processes
KERNELS = {  # stage -> what the names of its rows contain; the first that fits
    "matmuls": ("GEMM",),
    "norms": ("RMSNorm", "LayerNorm"),
    "fp8": ("quantize", "transpose", "E4M3"),
    "optimizer": ("AdamW", "gradient norm"),
    "others": ("",),
}
LAYER = (  # for ranks: of the size of llama2-7b's
    "--precision.mode", "bf16", "--model.hidden_size", "4096", "--model.intermediate_size", "11008",
    "--model.num_heads", "32", "--model.num_kv_heads", "32", "--model.head_dim", "128", "--data.seq_length", "2048",
)  # fmt: skip
FP8, BF16_MOMENTS = ("--precision", "fp8", "--optimizer.moments", "bf16"), ("--optimizer.moments", "bf16")
OVERLAPS = ("dp 2", "tp 2", "pp 2")
TWO, DOCUMENTS = ("--batch.micro", "2"), ("--documents", "1000")


@dataclass(frozen=True)
class Stage:
    """A stage: `command` is a program of the repository with its arguments.

    Attributes:
        decides: what is known after it.
        estimate_s: predicted seconds on an H200.
        needs: names of `environment.NEEDS`.
    """

    name: str
    decides: str
    command: Sequence[str]
    estimate_s: int
    needs: Sequence[str] = ("gpu", "kernels")
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeStep:
    """A whole training step to measure; `target` in tokens/s on an H200, for llama2-7b and 65,536 tokens a step."""

    name: str
    arguments: Sequence[str]
    target: float | None = None
    needs: Sequence[str] = ("gpu", "kernels")

    @property
    def stage_name(self) -> str:
        return f"step-{self.name.replace(', ', '-')}"

    @property
    def precision(self) -> str:
        """What its matmuls compute in: bf16, or the FP8 recipe."""
        return next((recipe for recipe in ("delayed", "tensorwise", "blockwise") if recipe in self.name), "bf16")


def whole_steps() -> list[WholeStep]:
    """List the whole steps: those that decide most first, each beside transformers in the same run."""
    theirs = ("gpu", "transformers")
    fp8 = {recipe: (*FP8, "--precision.recipe", recipe) for recipe in ("delayed", "tensorwise", "blockwise")}
    return [
        WholeStep("delayed", (*fp8["delayed"], "--profile"), 20_500, ("gpu", "kernels", "fp8")),
        WholeStep("tensorwise", (*fp8["tensorwise"], "--profile"), 20_000, ("gpu", "kernels", "fp8")),
        WholeStep("bf16", ("--profile",), 13_600),
        WholeStep("transformers-liger", ("--impl", "transformers-liger", "--profile"), None, (*theirs, "liger")),
        WholeStep("blockwise", (*fp8["blockwise"], "--profile"), 18_500, ("gpu", "kernels", "hopper")),
        WholeStep("bf16, two", (*BF16_MOMENTS, *TWO), 14_000),
        WholeStep("bf16, documents", DOCUMENTS, 14_150),
        WholeStep("delayed, documents", (*fp8["delayed"], *DOCUMENTS), 21_300, ("gpu", "kernels", "fp8")),
        WholeStep("delayed, two", (*fp8["delayed"], *TWO), None, ("gpu", "kernels", "fp8")),
        WholeStep("transformers", ("--impl", "transformers"), None, theirs),
        WholeStep("transformers-compiled", ("--impl", "transformers-compiled"), None, theirs),
        WholeStep("transformers-liger, two", ("--impl", "transformers-liger", *TWO), None, (*theirs, "liger")),
    ]


@dataclass(frozen=True)
class Scale:
    """How large the measurements are: of a 7B on a GPU, or a rehearsal of the programs on a CPU."""

    device: str = "cuda"
    preset: str = "llama2-7b"

    @property
    def rehearsed(self) -> bool:
        return self.device == "cpu"


def stages(scale: Scale, nccl: Path | None = None) -> list[Stage]:
    """List all stages in order; those that a CPU can rehearse need nothing there."""
    return [
        Stage("accumulate", "whether the custom FP8 matmul adds right, bit for bit",
              ("tools/bench/fp8_accumulate.py",), 20, ("gpu", "kernels", "hopper")),
        *_tests(),
        _sustained(scale),
        *(_step(step, scale) for step in whole_steps()),
        *_kernels(),
        _attention(scale),
        Stage("fp8-algorithms", "what choosing cuBLASLt's algorithms by measuring gains",
              ("tools/bench/fp8_algorithms.py",), 25, ("gpu", "kernels", "fp8")),
        *(_host(precision, scale) for precision in ("bf16", "delayed")),
        *_ranks(scale, nccl),
    ]  # fmt: skip


def _tests() -> Iterator[Stage]:
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    for path in sorted((p for p in files if p.stem != "test_ranks"), key=lambda path: path.stem != "test_fp8_sm90"):
        command = ("tools/bench/gpu/run_tests.py", str(path.relative_to(ROOT)))
        name = path.stem.removeprefix("test_").replace("_", "-")
        estimate = 60 if path.stem in TRAINING_TESTS else 25
        yield Stage(f"tests-{name}", f"whether {path.relative_to(ROOT)} passes", command, estimate)


def _step(step: WholeStep, scale: Scale) -> Stage:
    command = ("tools/bench/whole_step.py", *_size(scale), "--name", step_row(step, scale.preset), *step.arguments)
    needs = tuple(need for need in step.needs if need in ("transformers", "liger")) if scale.rehearsed else step.needs
    # with fp32 moments, the FP8 weights do not fit into an H200 in addition to the other 120 GiB
    memory = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    estimate = REHEARSAL_S if scale.rehearsed else 110
    return Stage(step.stage_name, f"tokens/s of {step.name}", command, estimate, needs, memory)


def step_row(step: WholeStep, preset: str) -> str:
    """Name the row of a whole step."""
    return f"{preset} {step.name}, whole step"


def _size(scale: Scale) -> Sequence[str]:
    size = ("--batch", "2", "--seq-length", "64", "--rounds", "1") if scale.rehearsed else ()
    return ("--device", scale.device, "--preset", scale.preset, *size)


def _kernels() -> Iterator[Stage]:
    left = [key(row) for row in rows()]
    for name, contained in KERNELS.items():
        chosen = [row for row in left if any(part in row for part in contained)]
        left = [row for row in left if row not in chosen]
        if chosen:
            command = ("tools/bench/kernels.py", "--only", *chosen)
            yield Stage(
                f"kernels-{name}", f"{len(chosen)} rows of the table of kernels", command, 30 + 10 * len(chosen)
            )


def _sustained(scale: Scale) -> Stage:
    size = ("--device", "cpu", "--size", "128", "--seconds", "0.001") if scale.rehearsed else ()
    needs = () if scale.rehearsed else ("gpu", "kernels")
    return Stage(
        "sustained", "the limits of the card, and the step's bound", ("tools/bench/sustained.py", *size), 25, needs
    )


def _attention(scale: Scale) -> Stage:
    size = ("--device", "cpu", "--tokens", "32", "--heads", "2") if scale.rehearsed else ()
    needs = () if scale.rehearsed else ("gpu",)
    return Stage("attention", "which attention is the fastest", ("tools/bench/attention.py", *size), 40, needs)


def _host(precision: str, scale: Scale) -> Stage:
    """The same depth at hidden size 256: the device waits for the host, whose time this is."""
    small = ("--model.hidden_size", "256", "--model.intermediate_size", "512", "--model.num_heads", "2",
             "--model.num_kv_heads", "2")  # fmt: skip
    settings = () if precision == "bf16" else (*FP8, "--precision.recipe", precision)
    name = f"{scale.preset} {precision}, time on the host"
    command = ("tools/bench/whole_step.py", *_size(scale), "--name", name, *settings, *small)
    needs = () if scale.rehearsed else ("gpu", "kernels", *(("fp8",) if settings else ()))
    estimate = REHEARSAL_S if scale.rehearsed else 40
    return Stage(f"host-{precision}", f"whether the host is late in {precision}", command, estimate, needs)


def _ranks(scale: Scale, nccl: Path | None) -> Iterator[Stage]:
    """Over NCCL where one that lets ranks share a GPU is given, otherwise through the host."""
    environment = {} if nccl is None else {"LD_PRELOAD": str(nccl)}
    backend = "staged" if nccl is None else "nccl"
    layouts = {
        "ranks-layouts": ("one rank", "dp 2", "tp 2", "pp 2", "pp 2, rank 1 fails in step 2"),
        "ranks-schedules": ("one rank", "pp 2, interleaved", "pp 2, zero bubble"),
        "ranks-hangs": ("pp 2, not warmed up", "pp 2, one hardware queue"),
    }
    size, needs = (("--device", "cpu"), ()) if scale.rehearsed else ((), ("gpu", "kernels"))
    for name, runs in layouts.items():
        command = ("tools/bench/ranks.py", *size, "--backend", backend, "--timeout", "30", "--only", *runs)
        yield Stage(name, f"whether {', '.join(runs)} train ({backend})", command, 15 * len(runs), needs, environment)
    layer = () if scale.rehearsed else LAYER
    command = (
        "tools/bench/ranks.py",
        *size,
        "--backend",
        backend,
        "--traces",
        "--timeout",
        "50",
        "--only",
        *OVERLAPS,
        *layer,
    )
    needs = () if scale.rehearsed else (*needs, "nccl")
    yield Stage("ranks-overlap", "how much communication is hidden", command, 90, needs, environment)
    for part in range(1, RANK_TESTS + 1):
        selected = ("--part", f"{part}/{RANK_TESTS}", "tests/gpu/test_ranks.py", "-k", f"{backend} or two_ranks")
        command = ("tools/bench/gpu/run_tests.py", *selected)
        decides = f"whether ranks give the numbers of one ({backend}, part {part} of {RANK_TESTS})"
        yield Stage(f"tests-ranks-{part}", decides, command, 120, environment=environment)
