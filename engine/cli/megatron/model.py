"""The model of a Megatron-LM command line: the section `model`, and why there may be none."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.checkpoint.huggingface.config import require_expressible
from engine.cli.megatron.arguments import Arguments, flag
from engine.cli.megatron.notes import Notes
from engine.config.foreign import MEGATRON, explain
from engine.config.schema import ModelConfig
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from engine.model.families import FAMILIES

_OTHER_FUNCTIONS = (  # switches and settings, each of which makes another function of the model
    "multi_latent_attention", "hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model", "squared_relu",
    "quick_geglu", "qk_l2_norm", "qk_clip", "apply_residual_connection_post_layernorm", "attention_output_gate",
    "experimental_attention_variant", "heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json",
    "enable_mhc_connections", "activation_func_clamp_value", "rotary_interleaved", "no_rope_freq", "spec",
    "mtp_num_layers", "use_mup",
    "apply_query_key_layer_scaling",
)  # fmt: skip
_OTHER_VALUES = {"rotary_percent": 1.0, "glu_linear_offset": 0.0, "softmax_type": "vanilla", "num_experts": 0}
_FAMILY_ARGUMENTS = ("normalization", "swiglu", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "window_size")
GPT2_VOCAB_SIZE = 50257


def translate_model(arguments: Arguments, notes: Notes) -> dict[str, Any]:
    """Return the section `model`; `notes.refused` says what it cannot express."""
    a = arguments
    _refuse_other_functions(a, notes)
    hidden, heads = a.required("hidden_size", notes.refused), a.required("num_attention_heads", notes.refused)
    has_groups, groups = a.switch("group_query_attention"), a.integer("num_query_groups")
    head_dim, is_tied = a.integer("kv_channels"), not a.switch("untie_embeddings_and_output_weights")
    is_gated, has_bias, window = a.switch("swiglu"), not a.switch("disable_bias_linear"), _window(a, notes)
    fields = {
        "norm": {"LayerNorm": "layer", "RMSNorm": "rms"}.get(a.text("normalization"), a.text("normalization")),
        "activation": "swiglu" if is_gated else "gelu",
        "qkv_bias": has_bias | a.switch("add_qkv_bias"),
        "output_bias": has_bias,
        "qk_norm": a.switch("qk_layernorm"),
    }
    own_head_dim = head_dim is not None and head_dim * heads != hidden
    layers = a.required("num_layers", notes.refused)
    window_layers = _window_layers(a, notes, layers)
    _describe_changes(a, notes, is_gated=is_gated)
    return {
        "family": _family(
            a, notes, fields, window is not None, some_windows=window_layers is not None, own_head_dim=own_head_dim
        ),
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": a.integer("ffn_hidden_size") or _default_ffn_size(hidden, is_gated=is_gated),
        "num_heads": heads,
        "num_kv_heads": groups if has_groups else heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": _vocab_size(a, notes),
        "max_position": a.required("max_position_embeddings", notes.refused),
        **fields,
        "norm_eps": a.real("norm_epsilon"),
        "rope_theta": float(a.integer("rotary_base")),
        **_rope_scaling(a, notes),
        **({"sliding_window": window} if window else {}),
        **({"window_layers": window_layers} if window_layers else {}),
        "tie_embeddings": is_tied,
        "init_std": a.real("init_method_std"),
    }


def _refuse_other_functions(a: Arguments, notes: Notes) -> None:
    names = [name for name in _OTHER_FUNCTIONS if a.switch(name)]
    for name, neutral in _OTHER_VALUES.items():
        value = a.text(name) if isinstance(neutral, str) else a.real(name)
        names += [name] if value not in (None, neutral) else []
    notes.refused += [f"{a.shown(name)}: {explain(name) or 'not implemented'}" for name in names]
    if "num_experts" in names:
        a.read |= {name for name in a.given if name.startswith("moe_")}
    if a.text("position_embedding_type") != "rope" and not a.switch("use_rotary_position_embeddings"):
        notes.refused.append(f"{a.shown('position_embedding_type')}: {explain('position_embedding_type')}")


def _describe_changes(a: Arguments, notes: Notes, *, is_gated: bool) -> None:
    dropouts = [name for name in ("attention_dropout", "hidden_dropout") if a.real(name)]
    if dropouts:
        notes.changed.append(f"{a.shown(*dropouts)}: not implemented: dropout; it is 0 here")
    for name in ("embedding_init_method_std", "init_method_xavier_uniform"):
        if a.switch(name):
            notes.changed.append(f"{a.shown(name)}: embeddings and matrices all start from model.init_std here")
    if not is_gated and a.switch("no_bias_gelu_fusion"):
        notes.changed.append(f"{a.shown('no_bias_gelu_fusion')}: GELU is exact then; here it is its tanh approximation")


def _family(
    a: Arguments, notes: Notes, fields: dict[str, Any], has_window: bool, *, some_windows: bool, own_head_dim: bool
) -> str:
    """The first family that can express these fields, a window and a head size of its own."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_heads": 1,
        "num_kv_heads": 1,
    }
    sizes |= {"head_dim": 2 if own_head_dim else 4, "vocab_size": 4, "max_position": 4}
    sizes |= {"sliding_window": 2 if has_window else None, "window_layers": (0,) if some_windows else None}
    for row in FAMILIES.values():
        try:
            require_expressible(ModelConfig(family=row.name, **sizes, **fields))
        except (ConfigError, ValidationError):
            continue
        return row.name
    wanted = [f"model.{key} = {str(value).lower()}" for key, value in fields.items()]
    wanted += ["a window"] * has_window + ["a head size other than hidden_size / num_heads"] * own_head_dim
    given = ", ".join(a.shown(name) for name in _FAMILY_ARGUMENTS if name in a.given)
    absent = ", ".join(flag(name) for name in _FAMILY_ARGUMENTS[:-1] if name not in a.given)
    notes.refused.append(
        f"{given}{' without ' * bool(absent)}{absent}: no family of models has {', '.join(wanted)}; "
        f"families: {', '.join(FAMILIES)}"
    )
    return next(iter(FAMILIES))


def _default_ffn_size(hidden: int, *, is_gated: bool) -> int:
    """Megatron-LM's default: 4 h, and as many parameters with three matrices, in multiples of 64."""
    return int((4 * hidden * 2 / 3) / 64) * 64 if is_gated else 4 * hidden


def _window(a: Arguments, notes: Notes) -> int | None:
    """The sliding window, which counts the token itself; Megatron-LM counts the tokens before it."""
    text = a.text("window_size")
    left, _, right = (text or "").strip("()").replace(" ", "").partition(",")
    if text is None or (left.isdecimal() and right == "0"):
        return None if text is None else int(left) + 1
    notes.refused.append(f"{a.shown('window_size')}: expected N,0, which is a window over the N tokens before")
    return None


def _window_layers(a: Arguments, notes: Notes, layers: int) -> tuple[int, ...] | None:
    """Layers with the window if some have none: with N, every N-th has none."""
    text = a.text("window_attn_skip_freq")
    if text is None:
        return None
    if text.isdecimal() and 1 < int(text) <= layers and "window_size" in a.given:
        return tuple(layer for layer in range(layers) if (layer + 1) % int(text))
    notes.refused.append(
        f"{a.shown('window_attn_skip_freq')}: expected a number of layers from 2 with --window-size; of other patterns "
        "set model.window_layers"
    )
    return None


def _rope_scaling(a: Arguments, notes: Notes) -> dict[str, Any]:
    interpolation = a.real("rotary_seq_len_interpolation_factor")
    if a.switch("use_rope_scaling"):
        if interpolation:
            notes.refused.append(
                f"{a.shown('use_rope_scaling')}: {a.shown('rotary_seq_len_interpolation_factor')}, too"
            )
        return {"rope_scaling": {"factor": a.real("rope_scaling_factor")}}
    return {"rope_scaling": {"rope_type": "linear", "factor": interpolation}} if interpolation else {}


def _vocab_size(a: Arguments, notes: Notes) -> int:
    size = a.integer("padded_vocab_size") or a.integer("vocab_size")
    path, kind = a.text("tokenizer_model"), a.text("tokenizer_type")
    if size:
        return int(size)
    if path and Path(path).exists():
        return load_tokenizer(path).vocab_size
    if kind == "GPT2BPETokenizer" or (kind is None and "merge_file" in a.given):
        return GPT2_VOCAB_SIZE
    where = f", and {a.shown('tokenizer_model')} is not on this machine to tell it" if path else ""
    notes.refused.append(f"{flag('vocab_size')}: missing{where}; {MEGATRON['vocab_size']} needs it")
    return 1
