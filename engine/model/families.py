"""Families of models and their named sizes. To add a family, add one row; to add a size, one line to its `sizes`.

Everything that differs between families follows from the row: parameter names (`engine/model/parameters.py`),
`config.json` (`engine/checkpoint/huggingface/config.py`), the presets, and the values that `model.family` may have.
Parameter counts of the sizes are tested against the published ones. Pure, and light to import. Alternative considered:
a class per family, which hides that one decoder runs all of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config.schema import ModelConfig
from engine.errors import ConfigError


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class ConfigKey:
    """A key of `config.json` that some families have, and the `ModelConfig` field that it sets.

    Attributes:
        default: what a missing key means, as `config.json` would say it.
        read: the field's value from the key's.
        write: the key's value from the field's.
    """

    name: str
    field: str
    default: Any = None
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture as Hugging Face has it, one row.

    Attributes:
        name: value of `model.family`, and `model_type` in `config.json`.
        architecture: Hugging Face's class.
        fields: `ModelConfig` fields that the architecture fixes.
        only: settings of `config.json` for which we implement this value alone; it is also their default.
        harmless: settings of `config.json` that do not change the model, beyond those of every family.
        sizes: by preset name, `ModelConfig` fields beyond `fields`.
        defaults: what a key missing from `config.json` means, where that differs between families.
        norm_key: the key of the norm's epsilon in `config.json`.
        keys: keys of `config.json` beyond those of every family; two may set two fields from one key.
        derived: fields that follow from the other fields, by name.
        windows: layers with a sliding window where `config.json` has no `layer_types`, from `config.json` and the
            number of layers; None if the family has no sliding windows.
        window_keys: keys that say which layers have the window, beyond `sliding_window`.
        has_head_dim: whether the head size may differ from hidden_size / num_heads.
        rope_types: types of rotary scaling.
        has_partial_rope: whether `partial_rotary_factor` applies.
        has_local_rope: whether layers with a window have rotary frequencies of their own, `rope_local_base_freq`.
        up_names: names of the feed-forward projections from the hidden size, fused into one parameter in this order.
        down_name: name of the feed-forward projection back to the hidden size.
        stacked: weights of a layer that its files hold as one tensor, by the name of that tensor: the rows of each, in
            order.
    """

    name: str
    architecture: str
    fields: dict[str, Any]
    only: dict[str, Any]
    sizes: Mapping[str, dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    norm_key: str = "rms_norm_eps"
    keys: tuple[ConfigKey, ...] = ()
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    windows: Callable[[Mapping[str, Any], int], Iterable[int]] | None = None
    window_keys: tuple[str, ...] = ()
    has_head_dim: bool = True
    rope_types: tuple[str, ...] = ("linear", "dynamic", "yarn", "llama3", "longrope")
    has_partial_rope: bool = False
    has_local_rope: bool = False
    up_names: tuple[str, ...] = ("gate_proj", "up_proj")
    down_name: str = "down_proj"
    stacked: Mapping[str, Callable[[ModelConfig], dict[str, int]]] = field(default_factory=dict)

    def with_derived(self, fields: dict[str, Any]) -> dict[str, Any]:
        """`fields` with those that follow from them."""
        return fields | {name: derive(fields) for name, derive in self.derived.items()}


def _size(
    layers: int, hidden: int, ffn: int, heads: int, kv: int, vocab: int, max_position: int, **others: Any
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position": max_position,
        **others,
    }


def _every_layer(_: Mapping[str, Any], layers: int) -> Iterable[int]:
    return range(layers)


def _from_max_window_layers(config: Mapping[str, Any], layers: int) -> Iterable[int]:
    first = config.get("max_window_layers")
    return [layer for layer in range(layers) if layer >= (28 if first is None else first)]


def _every_other(_: Mapping[str, Any], layers: int) -> Iterable[int]:
    return range(0, layers, 2)


def _all_but_every_sixth(config: Mapping[str, Any], layers: int) -> Iterable[int]:
    return (layer for layer in range(layers) if (layer + 1) % (config.get("sliding_window_pattern") or 6))


def _number(name: str, field: str, default: float) -> ConfigKey:
    """A key that must be a number: null is its default."""
    return ConfigKey(name, field, default, read=lambda value: default if value is None else value)


_GATED = {"norm": "rms", "activation": "swiglu", "qk_norm": False}
_LLAMA_FIELDS = _GATED | {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
_ATTENTION_BIAS = (
    ConfigKey("attention_bias", "qkv_bias", default=False, read=bool),
    ConfigKey("attention_bias", "output_bias", default=False, read=bool),
)
_LLAMA31_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}
_QWEN_WINDOWS = ("layer_types", "use_sliding_window", "max_window_layers")
_QWEN = {"norm_eps": 1e-6, "rope_theta": 1e6}
_GEMMA_FIELDS = _GATED | {
    "activation": "geglu", "norm_placement": "both", "zero_centered_norm": True, "embedding_scale": "sqrt_hidden",
    "mlp_bias": False,
}  # fmt: skip
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip
_ATTENTION_SCALAR = ConfigKey(
    "query_pre_attn_scalar",
    "attention_scale",
    256,
    read=lambda scalar: (256 if scalar is None else scalar) ** -0.5,
    write=lambda scale: None if scale is None else round(scale**-2),
)
_GEMMA = {"norm_eps": 1e-6, "attention_scale": 256**-0.5, "tie_embeddings": True}
_GEMMA2 = _GEMMA | {"attention_softcap": 50.0, "logits_softcap": 30.0}
_GEMMA3 = _GEMMA | {"rope_theta": 1e6, "rope_local_theta": 1e4}
_GRANITE3 = {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.0078125, "logits_scaling": 16.0}
_TINY = _size(4, 64, 176, 4, 2, 257, 4096)  # 257: the byte tokenizer


def _phi3_qkv(model: ModelConfig) -> dict[str, int]:
    kv = model.num_kv_heads * model.head_dim
    return {"self_attn.q_proj": model.num_heads * model.head_dim, "self_attn.k_proj": kv, "self_attn.v_proj": kv}


def _phi3_gate_up(model: ModelConfig) -> dict[str, int]:
    return {"mlp.gate_proj": model.intermediate_size, "mlp.up_proj": model.intermediate_size}


_ROWS = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        fields=_GATED,
        only={"hidden_act": "silu"},
        sizes={
            "llama2-7b": _size(32, 4096, 11008, 32, 32, 32000, 4096),
            "llama3-8b": _size(32, 4096, 14336, 32, 8, 128256, 8192, rope_theta=5e5),
            "llama3.1-8b": _size(32, 4096, 14336, 32, 8, 128256, 131072, rope_theta=5e5, rope_scaling=_LLAMA31_ROPE),
            "tiny": _TINY,
            "tiny-llama3": _TINY | {"rope_scaling": _LLAMA31_ROPE | {"original_max_position": 256}},
        },
        harmless=("max_sequence_length", "is_llama_config"),
        keys=(*_ATTENTION_BIAS, ConfigKey("mlp_bias", "mlp_bias", default=False, read=bool)),
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        fields=_LLAMA_FIELDS,
        only={"hidden_act": "silu"},
        sizes={
            "mistral-7b": _size(32, 4096, 14336, 32, 8, 32000, 32768, sliding_window=4096),
            "tiny-mistral": _TINY | {"sliding_window": 32},
        },
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        windows=_every_layer,
    ),
    Family(
        name="ministral",
        architecture="MinistralForCausalLM",
        fields=_LLAMA_FIELDS,
        only={"hidden_act": "silu"},
        sizes={"tiny-ministral": _TINY | {"sliding_window": 32, "window_layers": (0, 1, 2)}},
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        windows=_every_layer,
        window_keys=("layer_types",),
    ),
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        fields=_LLAMA_FIELDS,
        only={"hidden_act": "silu"},
        sizes={
            "phi3-mini-4k": _size(32, 3072, 8192, 32, 32, 32064, 4096, sliding_window=2047),
            "phi4": _size(40, 5120, 17920, 40, 10, 100352, 16384, rope_theta=250000.0),
            "tiny-phi3": _TINY | {"partial_rotary_factor": 0.75, "sliding_window": 32},
        },
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        windows=_every_layer,
        has_head_dim=False,
        rope_types=("longrope",),
        has_partial_rope=True,
        stacked={"self_attn.qkv_proj": _phi3_qkv, "mlp.gate_up_proj": _phi3_gate_up},
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        fields=_LLAMA_FIELDS | {"qkv_bias": True},
        only={"hidden_act": "silu"},
        sizes={
            "qwen2.5-7b": _size(28, 3584, 18944, 28, 4, 152064, 131072) | _QWEN,
            "tiny-qwen2": _TINY | _QWEN,
        },
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        windows=_from_max_window_layers,
        window_keys=_QWEN_WINDOWS,
        has_head_dim=False,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        fields=_GATED | {"qk_norm": True, "mlp_bias": False},
        only={"hidden_act": "silu"},
        keys=_ATTENTION_BIAS,
        sizes={
            "qwen3-8b": _size(36, 4096, 12288, 32, 8, 151936, 40960, head_dim=128) | _QWEN,
            "tiny-qwen3": _TINY | _QWEN | {"head_dim": 32},
        },
        defaults={"head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096},
        windows=_from_max_window_layers,
        window_keys=_QWEN_WINDOWS,
    ),
    Family(
        name="starcoder2",
        architecture="Starcoder2ForCausalLM",
        fields={
            "norm": "layer",
            "activation": "gelu",
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "qk_norm": False,
        },
        only={"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "mlp_type": "default", "norm_type": "layer_norm"},
        sizes={
            "starcoder2-7b": _size(
                32, 4608, 18432, 36, 4, 49152, 16384, rope_theta=1e6, sliding_window=4096, tie_embeddings=True
            ),
            "tiny-starcoder2": _TINY | {"intermediate_size": 256, "sliding_window": 32, "tie_embeddings": True},
        },
        defaults={
            "tie_word_embeddings": True,
            "norm_epsilon": 1e-5,
            "num_key_value_heads": 2,
            "initializer_range": 0.018042,
        },
        norm_key="norm_epsilon",
        windows=_every_layer,
        has_head_dim=False,
        up_names=("c_fc",),
        down_name="c_proj",
    ),
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        fields=_GATED | {"norm_placement": "post", "qk_norm": True, "qk_norm_span": "projection", "mlp_bias": False},
        only={"hidden_act": "silu"},
        sizes={
            "olmo2-7b": _size(32, 4096, 11008, 32, 32, 100352, 4096, rope_theta=5e5, norm_eps=1e-6),
            "tiny-olmo2": _TINY | {"norm_eps": 1e-6},
        },
        defaults={"rms_norm_eps": 1e-5},
        keys=_ATTENTION_BIAS,
        has_head_dim=False,
    ),
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        fields=_GEMMA_FIELDS,
        only={"hidden_activation": "gelu_pytorch_tanh"},
        sizes={
            "gemma2-9b": _size(42, 3584, 14336, 16, 8, 256000, 8192, head_dim=256)
            | _GEMMA2
            | {"sliding_window": 4096, "window_layers": tuple(range(0, 42, 2))},
            "tiny-gemma2": _TINY
            | _GEMMA2
            | {"head_dim": 32, "sliding_window": 32, "window_layers": (0, 2), "attention_scale": 0.25},
        },
        defaults=_GEMMA_DEFAULTS,
        harmless=("hidden_act", "sliding_window_size", "cache_implementation"),  # which transformers does not read
        keys=(
            *_ATTENTION_BIAS,
            _ATTENTION_SCALAR,
            ConfigKey("attn_logit_softcapping", "attention_softcap", 50.0),
            ConfigKey("final_logit_softcapping", "logits_softcap", 30.0),
        ),
        windows=_every_other,
        window_keys=("layer_types",),
    ),
    Family(
        name="gemma3_text",
        architecture="Gemma3ForCausalLM",
        fields=_GEMMA_FIELDS | {"qk_norm": True},
        only={"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None},
        sizes={
            "gemma3-1b": _size(26, 1152, 6912, 4, 1, 262144, 32768, head_dim=256)
            | _GEMMA3
            | {"sliding_window": 512, "window_layers": tuple(i for i in range(26) if (i + 1) % 6)},
            "tiny-gemma3": _TINY | _GEMMA3 | {"head_dim": 32, "sliding_window": 32, "window_layers": (0, 1, 2)},
        },
        defaults=_GEMMA_DEFAULTS | {"rope_theta": 1e6},
        has_local_rope=True,
        harmless=("hidden_act", "sliding_window_pattern", "cache_implementation"),  # the second: see `windows`
        keys=(*_ATTENTION_BIAS, _ATTENTION_SCALAR, ConfigKey("final_logit_softcapping", "logits_softcap")),
        windows=_all_but_every_sixth,
        window_keys=("layer_types",),
    ),
    Family(
        name="granite",
        architecture="GraniteForCausalLM",
        fields=_GATED,
        only={"hidden_act": "silu"},
        sizes={
            "granite3-8b": _size(40, 4096, 12800, 32, 8, 49155, 4096) | _GRANITE3 | {"tie_embeddings": True},
            "tiny-granite": _TINY
            | {"embedding_scale": 3.0, "residual_scale": 0.5, "attention_scale": 0.2, "logits_scaling": 2.0}
            | {"tie_embeddings": True},
        },
        keys=(
            *_ATTENTION_BIAS,
            ConfigKey("mlp_bias", "mlp_bias", default=False, read=bool),
            _number("embedding_multiplier", "embedding_scale", 1.0),
            _number("residual_multiplier", "residual_scale", 1.0),
            _number("attention_multiplier", "attention_scale", 1.0),
            _number("logits_scaling", "logits_scaling", 1.0),
        ),
        has_head_dim=False,
    ),
)

FAMILIES: Mapping[str, Family] = {row.name: row for row in _ROWS}
PRESETS: dict[str, dict[str, Any]] = {
    name: row.with_derived({"family": row.name, **row.fields, **size})
    for row in _ROWS
    for name, size in row.sizes.items()
}


def stored_tensors(model: ModelConfig, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the tensors in a family's files: by name, its parts in order, each with its rows; a part may be all of it,
    which has rows 0.

    Args:
        names: of the model's weights, in model order.
    """
    stored: dict[str, dict[str, int]] = {}
    stacks = {name: rows_of(model) for name, rows_of in family_of(model.family).stacked.items()}
    of_part = {part: (stack, rows) for stack, parts in stacks.items() for part, rows in parts.items()}
    for name in names:
        prefix, _, part = name.removesuffix(".weight").rpartition(".layers.")
        number, _, path = part.partition(".")
        stack, rows = of_part.get(path, (path, 0))
        stored.setdefault(f"{prefix}.layers.{number}.{stack}.weight" if rows else name, {})[name] = rows
    return stored


def family_of(name: str) -> Family:
    """The row of `model.family`.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in FAMILIES:
        raise ConfigError(f"model.family = {name!r} is unknown; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
