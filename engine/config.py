"""Every setting of a run, as pydantic models; one YAML file plus dotted overrides.

Precedence: defaults < model preset < file < command line. Unknown keys are errors with a suggestion and all
problems are reported at once, because a cluster job that dies on its second typo has waited in a queue twice.
Rejected: argparse flags (two hundred of them and no structure) and Python config files (code, not data).
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import PydanticCustomError

from engine.errors import ConfigError, TriaxisError

Presets = Mapping[str, Mapping[str, Any]]
Trained = Callable[[str, Path], tuple[Mapping[str, Any], str | None]]
"""Given `from_hf` or `from_checkpoint` and its directory: the fields of the model there, and its tokenizer."""
SOURCES = ("preset", "from_hf", "from_checkpoint")  # of the architecture


class Section(BaseModel):
    """A group of settings: immutable, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


class RunConfig(Section):
    dir: Path = Field(Path("runs/default"), description="everything the run writes goes below this directory")
    seed: int = Field(1234, description="seed of initial weights and of the order of the samples")
    resume: str = Field("auto", description="auto (newest checkpoint in run.dir), never, or a checkpoint directory")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")
    deterministic: bool = Field(False, description="bitwise repeats on a GPU, at some cost; a CPU always repeats")


class RopeScaling(Section):
    """Llama-3 frequency scaling: low frequencies are slowed down by `factor`."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position: PositiveInt = 8192


class ModelConfig(Section):
    """Architecture of a dense decoder. A preset or a trained model fills the fields; those given beside it win."""

    preset: str | None = Field(None, description="a named size; see `engine/model/families.py`")
    from_hf: Path | None = Field(None, description="a Hugging Face directory: its architecture and initial weights")
    from_checkpoint: Path | None = Field(
        None, description="a run or a checkpoint, of any layout: its architecture and initial weights, and nothing else"
    )
    family: Literal["llama", "mistral", "qwen2", "qwen3", "starcoder2"] = Field(
        "llama", description="naming and config.json of the Hugging Face export"
    )
    num_layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_position: PositiveInt = Field(description="longest sequence the model is made for")
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: PositiveFloat = 1e-5
    activation: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    output_bias: bool = Field(False, description="biases on the attention output and the feed-forward layers")
    qk_norm: bool = False
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: PositiveInt | None = None
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02


class ParallelConfig(Section):
    """How the model is cut. Data parallelism takes the ranks that tp and pp leave: dp = ranks / (tp · pp)."""

    tp: PositiveInt | Literal["auto"] = Field(
        1,
        description="ranks that share each layer, best within a node; auto: with pp the smallest tp × pp that fits in "
        "90 % of the memory, of two as small the one with the larger tp, which divides the ranks of a node",
    )
    pp: PositiveInt | Literal["auto"] = Field(1, description="stages that share the layers; auto: see tp")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = Field("1f1b", description="order of a pipeline")
    virtual_stages: PositiveInt = Field(1, description="parts of the model on each stage, for the interleaved schedule")
    layers_per_stage: tuple[NonNegativeInt, ...] | None = Field(
        None, description="layers of each stage (each part, in model order, with virtual stages); null: by cost"
    )
    sharded_optimizer: bool = Field(True, description="optimizer state is divided among the data-parallel ranks")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations computed again in the backward pass: none; selective (attention, the outputs of norms "
        "and activation functions); full (all but the input of each layer)",
    )
    recompute_layers: PositiveInt | None = Field(
        None, description="recompute only in so many layers of each stage (each part); null: in all"
    )
    compile: bool = Field(False, description="torch.compile each layer: saves time on GPUs, costs it on CPUs")

    @field_validator("tp", "pp", mode="wrap")
    @classmethod
    def _one_problem(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Not one for each type that it could have been."""
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("size", "expected a number of at least 1, or auto") from None


class PrecisionConfig(Section):
    mode: Literal["auto", "fp32", "bf16", "fp8"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on a CPU; fp8: bf16, but the layers' products in FP8"
    )
    recipe: Literal["delayed", "tensorwise", "blockwise"] = Field("tensorwise", description="how FP8 finds its scales")
    amax_history: PositiveInt = Field(1024, description="steps that the scales of `delayed` look back")
    bf16_first_layers: int = Field(0, ge=0, description="layers at the start that FP8 leaves in bf16")
    bf16_last_layers: int = Field(0, ge=0, description="layers at the end that FP8 leaves in bf16")


class OpsConfig(Section):
    norm: Literal["auto", "triaxis", "torch", "apex", "te"] = Field("auto", description="auto: csrc's, else PyTorch's")
    attention: Literal["auto", "sdpa", "varlen", "flash_attn", "te"] = Field(
        "auto", description="auto: sdpa for sequences of one length, else flash_attn if installed, else varlen"
    )
    fp8_matmul: Literal["auto", "cublaslt", "triaxis", "torch"] = Field(
        "auto", description="auto: cuBLASLt through csrc, else PyTorch; triaxis: own kernel, for scales of blocks"
    )


class DatasetConfig(Section):
    path: Path = Field(description="prefix of a .bin/.idx pair")
    weight: PositiveFloat = Field(1.0, description="share of the samples, relative to the other datasets")


class DataConfig(Section):
    tokenizer: str = Field(
        description="a SentencePiece .model, a Hugging Face tokenizer.json, or `byte`; by default that of model.from_*"
    )
    train: list[DatasetConfig] = Field(
        min_length=1, description="sft: a weight, whole, is how often an epoch reads a dataset"
    )
    valid: list[DatasetConfig] = Field([], description="evaluate on these instead of a part of `train`")
    split: tuple[float, float, float] = Field(
        (98, 1, 1), description="train, validation, test; by documents: contiguous, or dealt out at random (sft)"
    )
    seq_length: PositiveInt
    packing: bool = Field(True, description="sft: several conversations in a sequence, which do not see each other")
    document_mask: bool = Field(True, description="tokens do not attend across documents")
    num_workers: int = Field(1, ge=0, description="processes that read ahead, per rank")


class BatchConfig(Section):
    micro: PositiveInt = Field(1, description="sequences in one forward pass on one rank")
    global_: PositiveInt = Field(alias="global", description="sequences in one optimizer step, over all ranks")


class OptimizerConfig(Section):
    lr: PositiveFloat = 3e-4
    weight_decay: float = Field(0.1, ge=0, description="on matrices; never on norms and biases")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    moments: Literal["fp32", "bf16"] = Field("fp32", description="dtype in which the two moments are kept")


class LrScheduleConfig(Section):
    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of all steps, where warmup_steps is 0")
    decay_steps: int | None = Field(None, ge=1, description="wsd only: steps of the final decay (default 10 %)")
    min_lr: float = Field(0.0, ge=0)


class TrainConfig(Section):
    steps: int = Field(0, ge=0, description="optimizer steps; 0: as many as train.epochs take")
    epochs: int = Field(
        0, ge=0, description="sft: passes over the data, if train.steps is not reached before; 0: endless"
    )
    eval_interval: int = Field(0, ge=0, description="steps between evaluations; 0 evaluates only at the end")
    eval_steps: int = Field(
        0, ge=0, description="global batches per evaluation; 0 never evaluates; sft: at most all there are"
    )
    early_stopping: int = Field(0, ge=0, description="end after so many evaluations without a new best; 0 never does")
    neftune_alpha: float = Field(
        0.0, ge=0, description="sft: strength of the noise on embeddings (NEFTune); 5 is usual"
    )
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-sum-exp of the logits in the training loss")
    max_nonfinite_steps: PositiveInt = Field(
        3,
        description="give up after so many consecutive steps with NaN or infinite gradients (each is skipped)",
    )


class CheckpointConfig(Section):
    interval: int = Field(1000, ge=0, description="steps between checkpoints; 0 saves only at the end")
    keep_last: PositiveInt = 3
    keep_best: bool = Field(
        False, description="save at every evaluation with a new best loss, and keep that checkpoint"
    )


class LogConfig(Section):
    interval: PositiveInt = 10
    tensorboard: bool = True


class Config(Section):
    """The whole configuration of a run."""

    task: Literal["pretrain", "sft"] = Field("pretrain", description="sft: supervised fine-tuning on conversations")
    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    ops: OpsConfig = OpsConfig()
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def to_yaml(self) -> str:
        """The resolved configuration, a line or two for each section; loading it gives an equal `Config`."""
        plain = self.model_dump(mode="json", by_alias=True)
        return "".join(f"{_flow_style({key: value})[1:-1]}\n" for key, value in plain.items())


def _flow_style(content: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(content, default_flow_style=True, sort_keys=False, allow_unicode=True, width=118)
    return text.strip()


def load(
    path: Path | str, overrides: Sequence[str] = (), *, presets: Presets, trained: Trained | None = None
) -> Config:
    """Read a YAML file and apply command-line overrides.

    Args:
        path: the YAML file.
        overrides: `["--batch.micro", "2", "--run.dir=runs/a"]`; values are YAML.
        presets: model fields by preset name.
        trained: looks into the directory of a trained model; without it there are only presets.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    return resolve(read_yaml(Path(path)), overrides, presets=presets, source=str(path), trained=trained)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected a mapping of sections")
    return content


def resolve(
    raw: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    presets: Presets,
    source: str,
    trained: Trained | None = None,
) -> Config:
    """Build a `Config` from nested mappings; see `load`."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    pairs = _pairs(overrides)
    if any(key == f"model.{name}" for key, _ in pairs for name in SOURCES):
        merged["model"] = {}  # a preset or a trained model on the command line replaces the file's model
    problems = [_apply_override(merged, key, value) for key, value in pairs]
    problems += [_apply_source(merged, presets, trained)]
    filled = {"model"} if problems[-1] is not None else set()  # what the source would have filled is not missing
    filled |= {"data.tokenizer"} if filled and not _named(merged, "preset") else set()
    config: Config | None = None
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        errors: list[dict[str, Any]] = [dict(item) for item in error.errors()]
        missing = [e for e in errors if e["type"] == "missing" and filled & {e["loc"][0], ".".join(map(str, e["loc"]))}]
        problems += [_describe(e) for e in errors if e not in missing]
    if config is not None:
        problems += _cross_checks(config)
    found = [problem for problem in problems if problem]
    if found or config is None:
        raise ConfigError("\n  ".join([f"{len(found)} problem{'s' * (len(found) > 1)} in {source}:", *found]))
    return config


def changed_settings(before: Mapping[str, Any], config: Config) -> list[str]:
    """What differs between the mapping of an earlier configuration and `config`, where both say something."""
    old, new = _flat(before), _flat(yaml.safe_load(config.to_yaml()))
    expected = {"run.dir", "run.resume", *(f"model.{name}" for name in SOURCES)}
    keys = [key for key in old if key in new and old[key] != new[key] and key not in expected]
    return [f"{key}: {old[key]} -> {new[key]}" for key in keys]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def with_steps(config: Config, rows: int | None = None) -> Config:
    """`config` with the steps of the run and of its warm-up as numbers.

    Args:
        rows: sequences of an epoch, in fine-tuning.

    Raises:
        ConfigError: the warm-up and the decay take longer than the run.
    """
    train, schedule = config.train, config.lr_schedule
    steps = train.steps
    if rows is not None and train.epochs:
        needed = math.ceil(train.epochs * rows / config.batch.global_)
        steps = min(steps, needed) if steps else needed
    warmup = schedule.warmup_steps or math.ceil(schedule.warmup_ratio * steps)
    behind = warmup + (schedule.decay_steps or 0)
    if behind > steps:
        raise ConfigError(
            f"lr_schedule.warmup_steps + decay_steps = {behind} is more than the {steps} steps of the run"
        )
    return config.model_copy(
        update={
            "train": train.model_copy(update={"steps": steps}),
            "lr_schedule": schedule.model_copy(update={"warmup_steps": warmup}),
        }
    )


def microbatches(config: Config, dp: int) -> int:
    """Forward passes per rank and optimizer step, for `dp` data-parallel ranks.

    Raises:
        ConfigError: the global batch cannot be cut so.
    """
    micro, total = config.batch.micro, config.batch.global_
    if total % (micro * dp):
        step = micro * dp
        near = sorted({max(step, total // step * step), (total // step + 1) * step})
        raise ConfigError(
            f"batch.global = {total} is not a multiple of batch.micro × data-parallel ranks = {micro} × {dp} = {step}; "
            f"{'the nearest that work are' if len(near) > 1 else 'the nearest that works is'} "
            f"batch.global = {' or '.join(map(str, near))}"
        )
    return total // (micro * dp)


def _pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """`--key value` and `--key=value` as pairs."""
    pairs, rest = [], list(overrides)
    while rest:
        item = rest.pop(0)
        if not item.startswith("--"):
            raise ConfigError(f"unexpected argument {item!r}; overrides look like --section.key VALUE")
        key, equals, value = item[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value, as in --{key} VALUE")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _apply_override(raw: dict[str, Any], key: str, text: str) -> str | None:
    *sections, last = key.split(".")
    node = raw
    for name in sections:
        child = node.get(name)
        if not isinstance(child, dict):
            child = node[name] = {}
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return f"--{key} {text}: not valid YAML ({error.__class__.__name__})"
    return None


def _named(raw: Mapping[str, Any], source: str) -> bool:
    """Whether the model names this source."""
    model = raw.get("model")
    return isinstance(model, dict) and model.get(source) is not None


def _apply_source(raw: dict[str, Any], presets: Presets, trained: Trained | None) -> str | None:
    """Fill the model's fields from where the model says, and the tokenizer where a trained model brings one."""
    given = [name for name in SOURCES if _named(raw, name)]
    if not given:
        return None
    model = raw["model"]
    name, value = given[0], model[given[0]]
    if len(given) > 1:
        return f"model.{' and model.'.join(given)} exclude each other: each is a whole model; keep one of them"
    if name != "preset" and trained is not None:
        try:
            fields, tokenizer = trained(name, Path(str(value)))
        except TriaxisError as error:
            return f"model.{name} = {value}: {error}"
        raw["model"] = {**fields, **model}
        if tokenizer is not None and isinstance(raw.get("data"), dict):
            raw["data"].setdefault("tokenizer", tokenizer)
    elif name == "preset":
        if not isinstance(value, str) or value not in presets:
            known = ", ".join(presets)
            return f"model.preset = {value!r} is unknown{_did_you_mean(str(value), presets)}; known: {known}"
        raw["model"] = {**presets[value], **model}
    return None


def _describe(item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    path = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"{path}: no such setting{_did_you_mean(location[-1], _siblings(location))}"
    if item["type"] == "missing":
        return f"{path}: is required and not given"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{path} = {item['input']!r}: {message}"


def _siblings(location: Sequence[str]) -> list[str]:
    """Names that would have been valid at the last part of `location`."""
    section: Any = Config
    for name in location[:-1]:
        if name.isdigit():
            continue
        fields = {field.alias or key: field for key, field in section.model_fields.items()}
        section = next(
            (t for t in _types(fields[name].annotation) if isinstance(t, type) and issubclass(t, Section)),
            None,
        )
        if section is None:
            return []
    return [field.alias or key for key, field in section.model_fields.items()]


def _types(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation] if not inner else [t for part in inner for t in _types(part)]


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _cross_checks(config: Config) -> list[str]:
    """Problems that concern more than one setting."""
    model, data, schedule, parallel = config.model, config.data, config.lr_schedule, config.parallel
    train, sft = config.train, config.task == "sft"
    checks = [
        (
            not train.steps and not (sft and train.epochs),
            f"train.steps{' or train.epochs' if sft else ''}: is required and not given",
        ),
        (
            not sft and any((train.epochs, train.neftune_alpha, not data.packing)),
            "train.epochs, train.neftune_alpha and data.packing are for task = sft",
        ),
        (
            sft and not data.document_mask,
            "data.document_mask = false would let conversations see each other; task = sft needs true",
        ),
        (
            (train.early_stopping > 0 or config.checkpoint.keep_best) and not train.eval_steps,
            "train.early_stopping and checkpoint.keep_best compare evaluations: set train.eval_steps and eval_interval "
            "too, or early_stopping = 0 and keep_best = false",
        ),
        (
            model.num_heads % model.num_kv_heads != 0,
            f"model.num_kv_heads = {model.num_kv_heads} does not divide model.num_heads = {model.num_heads}",
        ),
        (
            model.head_dim % 2 != 0,
            f"model.head_dim = {model.head_dim} is odd; rotary positions need an even size",
        ),
        (
            data.seq_length > model.max_position,
            f"data.seq_length = {data.seq_length} is longer than model.max_position = {model.max_position}; "
            "lower the first or raise the second",
        ),
        (
            min(data.split) < 0 or data.split[0] <= 0,
            f"data.split = {list(data.split)}: shares must be >= 0 and the first > 0",
        ),
        (
            train.eval_steps > 0 and data.split[1] == 0 and not data.valid,
            f"train.eval_steps = {train.eval_steps} needs a validation share in data.split = {list(data.split)}, or "
            "data.valid",
        ),
        (
            schedule.min_lr > config.optimizer.lr,
            f"lr_schedule.min_lr = {schedule.min_lr} is above optimizer.lr = {config.optimizer.lr}",
        ),
        (
            schedule.decay_steps is not None and schedule.kind != "wsd",
            f"lr_schedule.decay_steps only applies to kind wsd; kind = {schedule.kind}",
        ),
        (
            train.steps > 0 and schedule.warmup_steps + (schedule.decay_steps or 0) > train.steps,
            f"lr_schedule.warmup_steps + decay_steps = {schedule.warmup_steps + (schedule.decay_steps or 0)} is more "
            f"than train.steps = {train.steps}",
        ),
        (
            (parallel.virtual_stages > 1) != (parallel.schedule == "interleaved"),
            f"parallel.virtual_stages = {parallel.virtual_stages} and parallel.schedule = {parallel.schedule}: the "
            "interleaved schedule, and only that one, needs virtual_stages of at least 2",
        ),
        (
            parallel.recompute_layers is not None and parallel.recompute == "none",
            f"parallel.recompute_layers = {parallel.recompute_layers} needs parallel.recompute = selective or full",
        ),
        (
            parallel.compile and parallel.schedule == "zero_bubble",
            "parallel.compile = true compiles both halves of the backward pass into one, which parallel.schedule = "
            "zero_bubble needs apart; choose one of the two",
        ),
        (
            parallel.compile and config.precision.mode == "fp8",
            "parallel.compile = true would compile the layers' bf16 products, not those of precision.mode = fp8; "
            "choose one of the two",
        ),
        (
            config.precision.bf16_first_layers + config.precision.bf16_last_layers > model.num_layers,
            f"precision.bf16_first_layers + bf16_last_layers is more than model.num_layers = {model.num_layers}",
        ),
        (
            config.optimizer.moments == "bf16" and config.optimizer.betas[1] > 0.99,
            f"optimizer.moments = bf16 cannot follow betas[1] = {config.optimizer.betas[1]}: a change below 0.4 % is "
            "rounded away; use betas[1] <= 0.99 or moments = fp32",
        ),
        (
            not all(0 <= beta < 1 for beta in config.optimizer.betas),
            f"optimizer.betas = {list(config.optimizer.betas)}: both must be in [0, 1)",
        ),
    ]
    return [message for wrong, message in checks if wrong]
