"""Schema of the configuration: one frozen pydantic model per section, with types, defaults, ranges and descriptions.

`load.py` fills it from a YAML file and overrides, `checks.py` checks settings against each other, and `derived.py`
computes values from several settings. Functions take the section that they need.
Alternatives considered: argparse flags (two hundred of them and no structure) and Python config files (code, not data).
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

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
    model_validator,
)
from pydantic_core import PydanticCustomError

SOURCES = ("preset", "from_hf", "from_checkpoint")  # settings that give the architecture
NormImpl = Literal["auto", "triaxis", "torch", "apex", "te"]
AttentionImpl = Literal["auto", "sdpa", "varlen", "flash_attn", "flash_attn_3", "flash_attn_4", "cudnn", "te"]
Fp8MatmulImpl = Literal["auto", "cublaslt", "triaxis", "torch"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]


class Section(BaseModel):
    """A group of settings; immutable, rejects unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


class RunConfig(Section):
    """Output directory, resuming, seed and device."""

    dir: Path = Field(Path("runs/default"), description="output directory of the run")
    seed: int = Field(1234, description="seed of the initial weights and the order of the samples")
    resume: str = Field("auto", description="auto (newest checkpoint in run.dir), never, or a checkpoint directory")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if available")
    deterministic: bool = Field(
        False, description="bitwise reproducible: slower kernels on a GPU, and nothing is measured (ops.measure)"
    )


class RopeScaling(Section):
    """Scaling of the rotary frequencies, for texts longer than the model was first trained with."""

    rope_type: Literal["llama3", "linear", "dynamic", "yarn", "longrope"] = Field(
        "llama3",
        description="linear: all frequencies are divided by factor; llama3: the low ones; yarn: the low ones, and "
        "attention is sharper (arXiv 2309.00071); longrope: divisors of each frequency, others for documents longer "
        "than original_max_position (arXiv 2402.13753); dynamic: none up to max_position, beyond it at inference only",
    )
    factor: PositiveFloat | None = Field(
        None, description="divisor of frequencies; longrope, of attention_factor only: null is max_position / original"
    )
    low_freq_factor: PositiveFloat = Field(
        1.0, description="llama3: frequencies of fewer periods than this in original_max_position are divided by factor"
    )
    high_freq_factor: PositiveFloat = Field(
        4.0, description="llama3: frequencies of more periods than this stay as they are; between the two, interpolated"
    )
    beta_fast: PositiveFloat = Field(
        32.0, description="yarn: frequencies of more periods than this in original_max_position stay as they are"
    )
    beta_slow: PositiveFloat = Field(
        1.0, description="yarn: frequencies of fewer periods than this are divided by factor; between, interpolated"
    )
    truncate: bool = Field(True, description="yarn: the two limits are rounded to whole frequencies")
    attention_factor: PositiveFloat | None = Field(
        None, description="yarn, longrope: queries and keys are multiplied by it; null: from factor, as published"
    )
    short_factor: tuple[PositiveFloat, ...] | None = Field(
        None, description="longrope: divisor of each frequency for documents up to original_max_position"
    )
    long_factor: tuple[PositiveFloat, ...] | None = Field(
        None, description="longrope: divisor of each frequency for longer documents"
    )
    original_max_position: PositiveInt = Field(8192, description="sequence length of the model before the scaling")

    @model_validator(mode="after")
    def _has_its_fields(self) -> Self:
        kind = self.rope_type
        if self.factor is None and kind != "longrope":
            raise PydanticCustomError("rope", f"rope_type {kind} needs factor")
        if (kind == "longrope") != (self.short_factor is not None and self.long_factor is not None):
            raise PydanticCustomError(
                "rope", "short_factor and long_factor belong to rope_type longrope, which needs both"
            )
        if kind == "longrope" and self.original_max_position == 1:
            raise PydanticCustomError("rope", "rope_type longrope needs an original_max_position of more than 1")
        if self.low_freq_factor >= self.high_freq_factor:
            raise PydanticCustomError("rope", "low_freq_factor must be less than high_freq_factor")
        return self


class ModelConfig(Section):
    """Architecture of a dense decoder. A preset or a trained model fills the fields; explicit ones take precedence."""

    preset: str | None = Field(None, description="a named size; see `engine/model/families.py`")
    from_hf: Path | None = Field(None, description="a Hugging Face directory: its architecture and initial weights")
    from_checkpoint: Path | None = Field(
        None, description="a run or a checkpoint, of any layout: only its architecture and initial weights"
    )
    family: str = Field("llama", description="defines parameter names and config.json; see `engine/model/families.py`")
    num_layers: PositiveInt = Field(description="number of decoder layers")
    hidden_size: PositiveInt = Field(description="features of a token between layers")
    intermediate_size: PositiveInt = Field(description="features inside the feed-forward layer")
    num_heads: PositiveInt = Field(description="query heads")
    num_kv_heads: PositiveInt = Field(description="key and value heads; divides num_heads")
    head_dim: PositiveInt = Field(description="features of a head")
    vocab_size: PositiveInt = Field(description="entries of the embedding; at least those of the tokenizer")
    max_position: PositiveInt = Field(description="maximum sequence length of the model")
    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm, or LayerNorm with a bias")
    norm_eps: PositiveFloat = Field(1e-5, description="added to the variance in norms")
    norm_placement: Literal["pre", "post", "both"] = Field(
        "pre", description="norms of a layer: of the inputs of attention and feed-forward, of their outputs, or of both"
    )
    zero_centered_norm: bool = Field(False, description="RMSNorm multiplies by 1 + weight, in fp32")
    activation: Literal["swiglu", "geglu", "gelu"] = Field("swiglu", description="activation of the feed-forward layer")
    qkv_bias: bool = Field(False, description="biases on queries, keys and values")
    output_bias: bool = Field(False, description="a bias on the attention output")
    mlp_bias: bool | None = Field(None, description="biases on the feed-forward layers; null: as output_bias")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys")
    qk_norm_span: Literal["head", "projection"] = Field(
        "head", description="what qk_norm normalizes: each head, or all heads of a token together"
    )
    embedding_scale: PositiveFloat | Literal["sqrt_hidden"] = Field(
        1.0, description="the embeddings are multiplied by this; sqrt_hidden: the root of hidden_size, as Gemma"
    )
    residual_scale: PositiveFloat = Field(
        1.0, description="outputs of attention and feed-forward are multiplied by this before they are added"
    )
    attention_scale: PositiveFloat | None = Field(
        None, description="attention scores are multiplied by this; null: 1 / the root of head_dim"
    )
    attention_softcap: PositiveFloat | None = Field(
        None, description="limits attention scores to softcap · tanh(score / softcap)"
    )
    logits_scaling: PositiveFloat = Field(1.0, description="the logits are divided by this")
    logits_softcap: PositiveFloat | None = Field(
        None, description="limits the logits to softcap · tanh(logit / softcap)"
    )
    rope_theta: float = Field(10000.0, gt=1, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(None, description="scaling of the rotary frequencies")
    rope_local_theta: float | None = Field(
        None,
        gt=1,
        description="rope_theta of layers with a sliding window, without rope_scaling; null: as the other layers",
    )
    partial_rotary_factor: float = Field(1.0, gt=0, le=1, description="share of a head's features that is rotated")
    sliding_window: PositiveInt | None = Field(
        None, description="a token attends to this many, itself included; null: to all before it"
    )
    window_layers: tuple[NonNegativeInt, ...] | None = Field(
        None, description="layers with the sliding window, from 0; null: all, if there is a window"
    )
    tie_embeddings: bool = Field(False, description="the head uses the weights of the embedding")
    init_std: PositiveFloat = Field(0.02, description="standard deviation of initial weights")

    @model_validator(mode="before")
    @classmethod
    def _fill_mlp_bias(cls, data: Any) -> Any:
        filled = {"mlp_bias": data.get("output_bias", False)} if isinstance(data, dict) else {}
        return data | filled if filled and data.get("mlp_bias") is None else data

    @model_validator(mode="after")
    def _has_factors_of_its_size(self) -> Self:
        scaling = self.rope_scaling
        for factors in (scaling.short_factor, scaling.long_factor) if scaling else ():
            if factors is not None and len(factors) != self.rotary_dim // 2:
                raise PydanticCustomError(
                    "rope", f"rope_scaling: short_factor and long_factor need {self.rotary_dim // 2} numbers each"
                )
        return self

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated, the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, in tokens; None if it attends to all tokens before."""
        return self.sliding_window if self.window_layers is None or layer in self.window_layers else None


class ParallelConfig(Section):
    """Sharding of the model. Data parallelism uses the remaining ranks: dp = ranks / (tp · pp)."""

    tp: PositiveInt | Literal["auto"] = Field(
        1,
        description="tensor-parallel size, best within a node; auto: with pp, the smallest tp × pp that fits in 90 % "
        "of the memory (of two equally small, the one with the larger tp); tp divides the ranks of a node",
    )
    pp: PositiveInt | Literal["auto"] = Field(1, description="pipeline-parallel size (stages); auto: see tp")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = Field("1f1b", description="pipeline schedule")
    virtual_stages: PositiveInt = Field(1, description="model chunks per stage, for the interleaved schedule")
    layers_per_stage: tuple[NonNegativeInt, ...] | None = Field(
        None, description="layers per stage (per chunk, in model order, with virtual stages); null: by cost"
    )
    sharded_optimizer: bool = Field(True, description="shard the optimizer state over the data-parallel ranks")
    grad_reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="in which gradients are summed over the data-parallel ranks; bf16 halves the bytes. Each rank "
        "accumulates its own in fp32",
    )
    fp8_param_gather: bool = Field(
        False,
        description="all-gather the weights of FP8 matmuls in FP8 after each update: half the bytes, the same results, "
        "and no bf16 copy of other ranks' shards; needs precision.mode fp8, recipe tensorwise or delayed",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations to recompute in the backward pass: none; selective (attention, outputs of norms and "
        "activation functions); full (all but the input of each layer)",
    )
    recompute_layers: PositiveInt | None = Field(
        None, description="layers to recompute per stage (per chunk); null: all"
    )
    compile: bool = Field(False, description="torch.compile each layer: faster on GPUs, slower on CPUs")
    timeout_s: int = Field(
        1800,
        ge=60,
        le=7 * 24 * 3600,
        description="seconds that ranks wait for each other, at the start and in every collective",
    )
    hang_s: Annotated[float, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto",
        description="seconds without progress after which a run ends with code 70, with the stacks of all ranks in "
        "run.dir/hangs and the late rank named; auto: ten times the longest phase of its kind so far, at least 300 "
        "(600 where storage is read or written), at most timeout_s or twice the longest; null: no watchdog",
    )
    connect_timeout_s: int = Field(
        60, ge=5, le=3600, description="seconds after which a connection that does not answer at the start is an error"
    )

    @field_validator("tp", "pp", mode="wrap")
    @classmethod
    def _one_problem(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Report one error instead of one per type in the union."""
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("size", "expected a number of at least 1, or auto") from None


class PrecisionConfig(Section):
    """Dtype of parameters and activations, FP8 recipe, and layers kept in bf16."""

    mode: Literal["auto", "fp32", "bf16", "fp8"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on a CPU; fp8: bf16 with the layers' matmuls in FP8"
    )
    recipe: Fp8Recipe = Field("tensorwise", description="how FP8 scales are computed")
    amax_history: PositiveInt = Field(1024, description="steps in the amax history of `delayed`")
    bf16_first_layers: int = Field(0, ge=0, description="number of first layers kept in bf16")
    bf16_last_layers: int = Field(0, ge=0, description="number of last layers kept in bf16")


class OpsConfig(Section):
    """Operator implementations. The run fails at startup if one requested by name is not available."""

    norm: NormImpl = Field("auto", description="auto: csrc's, else PyTorch's")
    attention: AttentionImpl = Field(
        "auto",
        description="auto: on a GPU what measures fastest, for sequences of one length and for documents; "
        "without measuring sdpa, and varlen for documents on a GPU; see docs/attention.md",
    )
    fp8_matmul: Fp8MatmulImpl = Field(
        "auto",
        description="auto: cuBLASLt through csrc, else PyTorch; triaxis: custom kernel for blockwise scales, "
        "refused on a GPU until it is proven there",
    )
    measure: bool = Field(
        True,
        description="measure at the start, once per machine: MKL or oneDNN for fp32 matmuls on a CPU, cuBLASLt's "
        "algorithms for FP8 matmuls, attention on a GPU; false, or run.deterministic: oneDNN, the algorithm that "
        "cuBLASLt puts first, PyTorch's attention",
    )
    measured_dir: Path | None = Field(
        None,
        description="keeps measured choices, besides run.dir; null: $XDG_CACHE_HOME/triaxis, else ~/.cache/triaxis",
    )


class DatasetConfig(Section):
    """A preprocessed dataset and its weight in the mixture."""

    path: Path = Field(description="prefix of a .bin/.idx pair")
    weight: PositiveFloat = Field(1.0, description="share of the samples, relative to the other datasets")


class DataConfig(Section):
    """Datasets, tokenizer, and construction of sequences of `seq_length` tokens."""

    tokenizer: str = Field(
        description="a tokenizer's file, a directory with one, or `byte`; by default that of model.from_*"
    )
    train: list[DatasetConfig] = Field(
        min_length=1, description="sft: the weight must be an integer, the repeats of the dataset per epoch"
    )
    valid: list[DatasetConfig] = Field([], description="validation datasets, instead of a split of `train`")
    split: tuple[float, float, float] = Field(
        (98, 1, 1), description="fractions of train, validation and test documents; contiguous, or random (sft)"
    )
    seq_length: PositiveInt = Field(description="tokens per sequence, at most model.max_position")
    packing: bool = Field(
        True, description="sft: pack several conversations per sequence; they do not attend to each other"
    )
    document_mask: bool = Field(True, description="tokens do not attend across documents")
    on_change: Literal["refuse", "warn"] = Field(
        "refuse", description="resuming when the tokens of a dataset are not those that the checkpoint was trained with"
    )
    num_workers: int = Field(1, ge=0, description="data-loading processes per rank")


class BatchConfig(Section):
    """Batch sizes in sequences; a rank takes global / (micro · dp) microbatches per step."""

    micro: PositiveInt = Field(1, description="sequences in one forward pass on one rank")
    global_: PositiveInt = Field(alias="global", description="sequences in one optimizer step, over all ranks")


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay (arXiv 1711.05101) and gradient clipping."""

    lr: PositiveFloat = Field(3e-4, description="highest learning rate, after the warmup")
    weight_decay: float = Field(0.1, ge=0, description="applied to matrices, not to norms and biases")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the two moments")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    clip_grad: float = Field(1.0, ge=0, description="maximum global gradient norm; 0 disables clipping")
    moments: Literal["fp32", "bf16"] = Field("fp32", description="dtype of the two moments")


class LrScheduleConfig(Section):
    """Learning-rate schedule: linear warmup to `optimizer.lr`, then `kind`, which decays to `min_lr`."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="shape of the decay; wsd: constant, then a linear decay in the last decay_steps"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of the linear warmup")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="fraction of all steps, if warmup_steps is 0")
    decay_steps: int | None = Field(None, ge=1, description="wsd only: steps of the final decay (default 10 %)")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")


class TrainConfig(Section):
    """Length of the run, evaluation, extra terms of the loss, and early stopping."""

    steps: int = Field(0, ge=0, description="optimizer steps; 0: computed from train.epochs")
    epochs: int = Field(
        0, ge=0, description="sft: passes over the data; train.steps may end the run earlier; 0: no limit"
    )
    eval_interval: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_steps: int = Field(
        0, ge=0, description="global batches per evaluation; 0: no evaluation; sft: at most one epoch"
    )
    early_stopping: int = Field(0, ge=0, description="stop after this many evaluations without a new best; 0: never")
    neftune_alpha: float = Field(0.0, ge=0, description="sft: scale of the noise on embeddings (NEFTune); typically 5")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-sum-exp of the logits in the training loss")
    max_nonfinite_steps: PositiveInt = Field(
        3,
        description="abort after this many consecutive steps with NaN or infinite gradients (each is skipped)",
    )


class CheckpointConfig(Section):
    """Checkpoint interval and retention."""

    interval: int = Field(1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: PositiveInt = Field(3, description="newest checkpoints to keep; older ones are removed")
    keep_best: bool = Field(
        False, description="save at every evaluation with a new best loss, and keep that checkpoint"
    )


class LogConfig(Section):
    """Interval and outputs of metrics, in addition to `metrics.jsonl`."""

    interval: PositiveInt = Field(10, description="steps between lines of the log and of metrics.jsonl")
    tensorboard: bool = Field(True, description="write the metrics to RUN/tensorboard too")


class Config(Section):
    """Configuration of a run."""

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
        """Dump the resolved configuration as YAML, a line or two per section; loading it gives an equal `Config`."""
        plain = self.model_dump(mode="json", by_alias=True)
        return "".join(f"{_flow_style({key: value})[1:-1]}\n" for key, value in plain.items())


def _flow_style(content: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(content, default_flow_style=True, sort_keys=False, allow_unicode=True, width=118)
    return text.strip()
