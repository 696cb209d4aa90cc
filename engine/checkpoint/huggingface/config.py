"""Converts Hugging Face's `config.json` to `ModelConfig` and back.

Pure functions. The differences between families are in the rows of `engine/model/families.py`. A setting that the
engine does not implement would silently change the model, so every key of a file is either read, or known not to change
the model, or rejected by name. Files are written in the
format of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`), which transformers 5 reads too; both formats are
read.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from engine.checkpoint.huggingface.files import Json
from engine.config.schema import SOURCES, ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.families import FAMILIES, Family, family_of

# settings whose other values would change the model: the value that turns them off; null does so, too
_OFF: Json = {
    "auto_map": None, "quantization_config": None, "attention_bias": False, "mlp_bias": False,
    "output_router_logits": False,
    "is_causal": True, "is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0, "pruned_heads": {}, "use_mrope": False, "rope_interleaved": False,
    "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
    "use_bidirectional_attention": False,
}  # fmt: skip
# of training alone; there is no dropout here, which an import says
_DROPOUTS = (
    "attention_dropout", "residual_dropout", "embedding_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop",
    "embd_pdrop",
)  # fmt: skip
_READ = frozenset({
    *_DROPOUTS,
    "architectures", "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "layer_types",
    "tie_word_embeddings", "initializer_range",
})  # fmt: skip
# do not change the model: descriptions, token ids, outputs, and the settings of generation that transformers 4 wrote
_HARMLESS = frozenset({
    "transformers_version", "torch_dtype", "dtype", "use_bfloat16", "name_or_path", "tokenizer_class", "prefix",
    "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "is_decoder",
    "model_max_length", "unsloth_version", "unsloth_fixed", "transformers.js_config", "attn_implementation",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "tf_legacy_loss",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "pretraining_tp", "use_sdpa", "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "flash_attn",
    "gradient_checkpointing", "keys_to_ignore_at_inference",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
})  # fmt: skip
# numbers that the rows of families compute with: the smallest
_LEAST = {"max_window_layers": 0, "sliding_window_pattern": 1, "query_pre_attn_scalar": 1}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPE_KEYS = {  # by type
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
_ROPE_REQUIRED = _ROPE_KEYS | {"yarn": ("factor",), "longrope": ("short_factor", "long_factor")}
_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def model_config_from_hf(config: Mapping[str, Any]) -> Json:
    """Return the `ModelConfig` fields that a `config.json` describes.

    Raises:
        CheckpointError: an architecture or setting that is not implemented, or a missing field.
    """
    if config.get("model_type") == "mistral" and config.get("layer_types") is not None:  # as AutoModel
        config = dict(config) | {"model_type": "ministral", "architectures": ["MinistralForCausalLM"]}
    family = _family_of(config)
    if problems := list(_unsupported(config, family)):
        raise CheckpointError(f"config.json: {'; '.join(problems)}")

    def value(key: str, default: Any) -> Any:
        found = config.get(key, family.defaults.get(key))
        return default if found is None else found

    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    window, window_layers = _windows(config, family)
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
        **_rope(config, family),
        "sliding_window": window,
        "window_layers": window_layers,
        "tie_embeddings": value("tie_word_embeddings", False),
        "init_std": value("initializer_range", 0.02),
        **{key.field: key.read(config.get(key.name, key.default)) for key in family.keys},
        **family.fields,
    }
    if window is None:
        fields["rope_local_theta"] = None
    return family.with_derived(fields)


def ignored_settings(config: Mapping[str, Any]) -> list[str]:
    """Describe the settings of a `config.json` that change training, but not the model, and are not implemented."""
    used = [f"{key} = {config[key]}" for key in _DROPOUTS if config.get(key)]
    return [f"{', '.join(used)} in config.json (training here has no dropout)"] if used else []


def require_expressible(model: ModelConfig) -> None:
    """Check that Hugging Face's `config.json` can express a model.

    Raises:
        ConfigError: an unknown family, or a setting that would read back with another value.
    """
    family = family_of(model.family)
    read = ModelConfig.model_validate(model_config_from_hf(_architecture(model, family)))
    for name, seen in model:
        if name not in SOURCES and seen != (expected := getattr(read, name)):
            raise ConfigError(
                f"model.{name} = {seen!r} cannot be exported as {family.architecture}, which has {expected!r}; "
                "choose another model.family"
            )


def hf_config(
    model: ModelConfig, *, dtype: torch.dtype, bos_id: int | None, eos_id: int | None, pad_id: int | None = None
) -> Json:
    """Return the `config.json` of a model.

    Raises:
        ConfigError: see `require_expressible`.
    """
    require_expressible(model)
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    family = family_of(model.family)
    return _architecture(model, family) | ids | {"torch_dtype": _DTYPE_NAMES[dtype], "use_cache": True}


def _architecture(model: ModelConfig, family: Family) -> Json:
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
        "tie_word_embeddings": model.tie_embeddings,
    }
    keys = {key.name: key.write(getattr(model, key.field)) for key in family.keys}
    head_dim = {"head_dim": model.head_dim} if family.has_head_dim else {}
    return config | family.only | keys | head_dim | _rope_json(model, family) | _windows_json(model, family)


def _family_of(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures")
    for family in FAMILIES.values():
        if architectures == [family.architecture]:
            return family
    if architectures == ["Gemma3ForConditionalGeneration"]:
        raise CheckpointError(
            f"config.json: architectures = {architectures!r} has images, which are not supported; save its text model "
            "first, as docs/checkpoints.md shows"
        )
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise CheckpointError(f"config.json: architectures = {architectures!r} is not supported; known: {known}")


def _unsupported(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """Yield what is wrong with each setting that is neither read nor known not to change the model."""
    known = _READ | _HARMLESS | {family.norm_key, *family.harmless, *(key.name for key in family.keys)}
    known |= {"sliding_window", *family.window_keys} if family.windows else set()
    known |= {"rope_local_base_freq"} if family.has_local_rope else set()
    only = {"model_type": family.name, **family.only}
    off = _OFF | {"seq_length": config.get("max_position_embeddings"), "rotary_emb_base": config.get("rope_theta")}
    if not family.fields.get("qkv_bias"):
        off |= {"bias": False, "qkv_bias": False}
    for key, seen in config.items():
        if key in only:
            if seen != only[key] and not (seen is None and only[key] is False):
                yield f"{key} = {seen!r} is not supported; expected {only[key]!r}"
        elif key.startswith("_") or seen is None:
            continue
        elif key in known:
            if key in _LEAST and not (isinstance(seen, (int, float)) and seen >= _LEAST[key]):
                yield f"{key} = {seen!r}; expected a number of at least {_LEAST[key]}"
        elif key not in off:
            yield f"{key} = {seen!r} is unknown and may change the model; remove it from config.json if it does not"
        elif key == "quantization_config":
            yield f"{key} = {seen!r} is not supported; dequantize in transformers and save in bf16"
        elif key == "auto_map":
            yield f"{key} = {seen!r} names code, which is not run; remove it if transformers has {family.architecture}"
        elif seen != off[key]:
            yield f"{key} = {seen!r} is not supported; expected {off[key]!r}"
    kinds = config.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        yield f"layer_types = {kinds!r}; expected a list of texts"
        return
    if len(kinds) != config.get("num_hidden_layers"):
        yield f"layer_types has {len(kinds)} entries; expected num_hidden_layers = {config.get('num_hidden_layers')}"
    if family.windows is None or "layer_types" not in family.window_keys:
        kind = _FULL if family.windows is None or _window(config, family) is None else _SLIDING
        if set(kinds) - {kind}:
            seen = ", ".join(sorted(set(kinds)))
            yield f"layer_types has {seen}; expected {kind} only, as every layer of {family.architecture} is alike"


def _count(config: Mapping[str, Any], key: str) -> int:
    found = config.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"config.json: {key} = {found!r}; expected a positive integer")
    return found


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the size of the sliding window: null means no window, a missing key the family's default."""
    if "use_sliding_window" in family.window_keys and not config.get("use_sliding_window"):
        return None
    window: int | None = config.get("sliding_window", family.defaults.get("sliding_window"))
    return window


def _windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, tuple[int, ...] | None]:
    """Return `sliding_window` and `window_layers`.

    Raises:
        CheckpointError: `layer_types` does not fit.
    """
    if family.windows is None:
        return None, None
    layers, window = _count(config, "num_hidden_layers"), _window(config, family)
    kinds = config.get("layer_types") if "layer_types" in family.window_keys else None
    if kinds is None:
        windowed = () if window is None else tuple(family.windows(config, layers))
    elif not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {_FULL, _SLIDING}:
        raise CheckpointError(f"config.json: layer_types = {kinds!r}; expected {layers} of {_FULL} or {_SLIDING}")
    else:
        windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == _SLIDING)
    if windowed and window is None:
        raise CheckpointError(f"config.json: layer_types has {_SLIDING}, but there is no sliding_window")
    if not windowed:
        return None, None
    return window, None if len(windowed) == layers else windowed


def _windows_json(model: ModelConfig, family: Family) -> Json:
    if family.windows is None:
        return {}
    windows = [model.window(layer) for layer in range(model.num_layers)]
    has_window = any(windows)
    found: Json = {
        "sliding_window": model.sliding_window,
        "layer_types": [_SLIDING if window else _FULL for window in windows],
        "use_sliding_window": has_window,
        "max_window_layers": windows.index(model.sliding_window) if has_window else model.num_layers,
    }
    return {key: found[key] for key in ("sliding_window", *family.window_keys)}


def _rope(config: Mapping[str, Any], family: Family) -> Json:
    """Return the fields about rotary positions, from `rope_theta` and `rope_scaling` (transformers 4) or
    `rope_parameters` (5), which may have an object for each kind of layer.
    """
    rope = _rope_parameters(config)
    local = config.get("rope_local_base_freq", 10000.0) if family.has_local_rope else None
    if family.has_local_rope and rope.keys() & {_FULL, _SLIDING}:
        sliding = dict(rope.get(_SLIDING) or {})
        local = sliding.pop("rope_theta", local)
        if sliding.pop("rope_type", "default") != "default" or sliding or rope.keys() - {_FULL, _SLIDING}:
            raise CheckpointError(f"config.json: rotary positions {rope!r} are not supported")
        rope = dict(rope.get(_FULL) or {})
    outer, inner = config.get("rope_theta"), rope.pop("rope_theta", None)
    if outer and inner and outer != inner:
        raise CheckpointError(f"config.json: rope_theta is {outer!r}, but {inner!r} among the rotary settings")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    partial = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    partial = 1.0 if partial is None else partial
    if kind in ("su", "yarn") and family.rope_types == ("longrope",):  # Phi-3's earlier names
        kind = "longrope"
    if kind not in ("default", *family.rope_types):
        known = ", ".join(("default", *family.rope_types))
        raise CheckpointError(
            f"config.json: rotary positions of type {kind!r} are not supported; {family.architecture} has {known}"
        )
    unknown = sorted(map(str, rope.keys() - {*_ROPE_KEYS.get(kind, ()), "original_max_position_embeddings"}))
    if partial != 1.0 and not family.has_partial_rope:
        unknown.insert(0, f"partial_rotary_factor {partial}")
    if unknown:
        raise CheckpointError(
            f"config.json: rotary positions of type {kind!r} with {', '.join(unknown)} are not supported"
        )
    return {
        "rope_theta": inner or outer or family.defaults.get("rope_theta", 10000.0),
        "rope_scaling": None if kind == "default" else _scaling(kind, rope, config, family),
        "rope_local_theta": local,
        "partial_rotary_factor": partial,
    }


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_scaling` or `rope_parameters`; if there are both, they must agree."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for key, rope in {"rope_scaling": old, "rope_parameters": new}.items():
        if not isinstance(rope, dict):
            raise CheckpointError(f"config.json: {key} = {rope!r}; expected an object")
    differing = {key for key in old.keys() | new.keys() if old and new and old.get(key) != new.get(key)}
    if differing - {"rope_theta"} or (differing and "rope_theta" in old.keys() & new.keys()):
        raise CheckpointError(f"config.json: rope_scaling = {old!r} and rope_parameters = {new!r} differ; remove one")
    return {key: value for key, value in (old | new).items() if value is not None}


def _scaling(kind: str, rope: Json, config: Mapping[str, Any], family: Family) -> Json:
    """Return the fields of `RopeScaling`. `original_max_position_embeddings` beside the rotary settings comes first, as
    in transformers.
    """
    if missing := [key for key in _ROPE_REQUIRED[kind] if key not in rope]:
        raise CheckpointError(f"config.json: rotary positions of type {kind} without {missing[0]!r}")
    found = {key: rope[key] for key in _ROPE_KEYS[kind] if key in rope and not key.startswith("mscale")}
    if kind in ("llama3", "yarn", "longrope"):
        outer = config.get("original_max_position_embeddings", family.defaults.get("original_max_position_embeddings"))
        inner = rope.get("original_max_position_embeddings")
        found["original_max_position"] = outer or inner or config.get("max_position_embeddings")
    for key in ("factor", "mscale", "mscale_all_dim"):
        if not isinstance(rope.get(key, 1), (int, float)):
            raise CheckpointError(f"config.json: {key} = {rope[key]!r} of the rotary positions; expected a number")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if kind == "yarn" and mscale and all_dim and "attention_factor" not in rope and rope["factor"] > 1:
        over, under = (0.1 * scale * math.log(rope["factor"]) + 1 for scale in (mscale, all_dim))
        found["attention_factor"] = over / under
    return found | {"rope_type": kind}


def _rope_json(model: ModelConfig, family: Family) -> Json:
    """Return the keys about rotary positions, LongRoPE's as Phi-3 has them."""
    scaling = model.rope_scaling
    found: Json = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if family.has_partial_rope:
        found["partial_rotary_factor"] = model.partial_rotary_factor
    if family.has_local_rope:
        found["rope_local_base_freq"] = model.rope_local_theta
    if scaling is None:
        return found
    values = scaling.model_dump(mode="json")
    keys = {key: values[key] for key in _ROPE_KEYS[scaling.rope_type] if values.get(key) is not None}
    if scaling.rope_type == "longrope":
        found["original_max_position_embeddings"] = scaling.original_max_position
        return found | {"rope_scaling": {"type": "longrope", **keys}}
    if scaling.rope_type in ("llama3", "yarn"):
        keys["original_max_position_embeddings"] = scaling.original_max_position
    return found | {"rope_scaling": {"rope_type": scaling.rope_type, **keys}}
