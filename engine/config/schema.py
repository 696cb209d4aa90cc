"""Schema of the configuration: one frozen pydantic model per section, with types, defaults, ranges and descriptions.

`load.py` fills it from a YAML file and overrides, `checks.py` checks settings against each other, and `derived.py`
computes values from several settings. Functions take the section that they need.
Alternatives considered: argparse flags (two hundred of them and no structure) and Python config files (code, not data).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

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
    """Llama-3 RoPE scaling: low frequencies are divided by `factor`."""

    factor: PositiveFloat = Field(description="divisor of low frequencies")
    low_freq_factor: PositiveFloat = Field(
        1.0, description="frequencies of fewer periods than this in original_max_position are divided by factor"
    )
    high_freq_factor: PositiveFloat = Field(
        4.0, description="frequencies of more periods than this stay as they are; between the two, interpolated"
    )
    original_max_position: PositiveInt = Field(8192, description="sequence length of the model before the scaling")


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
    activation: Literal["swiglu", "gelu"] = Field("swiglu", description="activation of the feed-forward layer")
    qkv_bias: bool = Field(False, description="biases on queries, keys and values")
    output_bias: bool = Field(False, description="biases on the attention output and the feed-forward layers")
    qk_norm: bool = Field(False, description="RMSNorm on each head of queries and keys")
    rope_theta: PositiveFloat = Field(10000.0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(None, description="Llama-3 scaling of the rotary frequencies")
    sliding_window: PositiveInt | None = Field(
        None, description="a token attends to this many, itself included; null: to all before it"
    )
    tie_embeddings: bool = Field(False, description="the head uses the weights of the embedding")
    init_std: PositiveFloat = Field(0.02, description="standard deviation of initial weights")


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
    hang_s: Annotated[float, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="seconds without progress after which a run ends with code 70, with the stacks of all ranks in "
        "run.dir/hangs and the late rank named; auto: ten times the longest phase of its kind so far, at least 120 "
        "(600 where storage is read or written), at most timeout_s",
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
        description="a SentencePiece .model, a Hugging Face tokenizer.json, or `byte`; by default that of model.from_*"
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
