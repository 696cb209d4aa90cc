"""Converts Hugging Face's `config.json` to `ModelConfig` and back.

Pure functions. The differences between families are in the rows of `engine/model/families.py`. A setting that the
engine does not implement would silently change the model, so it is rejected with the reason. Files are written in the
format of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`), which transformers 5 reads too; both formats are
read.
"""

from collections.abc import Mapping
from typing import Any

import torch

from engine.checkpoint.huggingface.files import Json
from engine.config.schema import ModelConfig, RopeScaling
from engine.errors import CheckpointError, ConfigError
from engine.model.families import FAMILIES, Family, family_of

_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def model_config_from_hf(config: Mapping[str, Any]) -> Json:
    """Return the `ModelConfig` fields that a `config.json` describes.

    Raises:
        CheckpointError: an architecture or setting that is not implemented, or a missing field.
    """
    family = _family_of(config)
    for key, expected in {**family.only, "auto_map": None, "quantization_config": None}.items():
        if config.get(key, expected) != expected:
            raise CheckpointError(f"config.json: {key} = {config[key]!r} is not supported; expected {expected!r}")
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()) and not family.has_window:
        raise CheckpointError(f"config.json: layer_types = {config['layer_types']} is not supported")

    def value(key: str, default: Any) -> Any:
        found = config.get(key, family.defaults.get(key))
        return default if found is None else found

    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    theta, scaling = _rope(config)
    fields = {
        "family": family.name,
        "num_layers": _count(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "intermediate_size": _count(config, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": value("num_key_value_heads", heads),
        "head_dim": value("head_dim", hidden // heads),
        "vocab_size": _count(config, "vocab_size"),
        "max_position": _count(config, "max_position_embeddings"),
        "norm_eps": value(family.norm_key, 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": _window(config, family),
        "tie_embeddings": value("tie_word_embeddings", False),
        "init_std": value("initializer_range", 0.02),
    }
    return fields | family.fields


def require_expressible(model: ModelConfig) -> None:
    """Check that Hugging Face's `config.json` can express a model.

    Raises:
        ConfigError: an unknown family, or a setting that this family fixes to another value.
    """
    family = family_of(model.family)
    values, fixed = dict(model), dict(family.fields)
    if not family.has_window:
        fixed["sliding_window"] = None
    if not family.has_head_dim:
        fixed["head_dim"] = model.hidden_size // model.num_heads
    for name, expected in fixed.items():
        if (seen := values[name]) != expected:
            raise ConfigError(
                f"model.{name} = {seen!r} cannot be exported as {family.architecture}, which has {expected!r}; "
                "choose another model.family"
            )


def hf_config(model: ModelConfig, *, dtype: torch.dtype, bos_id: int | None, eos_id: int | None) -> Json:
    """Return the `config.json` of a model.

    Raises:
        ConfigError: see `require_expressible`.
    """
    require_expressible(model)
    family = family_of(model.family)
    config = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "max_position_embeddings": model.max_position,
        "initializer_range": model.init_std,
        family.norm_key: model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": _scaling_json(model.rope_scaling),
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": _DTYPE_NAMES[dtype],
        "use_cache": True,
    }
    window = {"sliding_window": model.sliding_window} if family.has_window else {}
    head_dim = {"head_dim": model.head_dim} if family.has_head_dim else {}
    return config | family.only | window | head_dim


def _family_of(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures")
    for family in FAMILIES.values():
        if architectures == [family.architecture]:
            return family
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise CheckpointError(f"config.json: architectures = {architectures!r} is not supported; known: {known}")


def _count(config: Mapping[str, Any], key: str) -> int:
    found = config.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"config.json: {key} = {found!r}; expected a positive integer")
    return found


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the sliding window: null means no window, a missing key the family's default."""
    return config.get("sliding_window", family.defaults.get("sliding_window")) if family.has_window else None


def _rope(config: Mapping[str, Any]) -> tuple[float, Json | None]:
    """Return base and scaling from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: rope_scaling = {rope!r}; expected an object")
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "llama3") or partial != 1.0:
        seen = f"rotary positions of type {kind!r} with partial_rotary_factor {partial}"
        raise CheckpointError(f"config.json: {seen} are not supported; known: default and llama3, on the whole head")
    if kind == "default":
        return theta, None
    original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    try:
        factors = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
    except KeyError as error:
        raise CheckpointError(f"config.json: rotary positions of type llama3 without {error}") from None
    return theta, factors | {"original_max_position": original}


def _scaling_json(scaling: RopeScaling | None) -> Json | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
