import contextlib
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.checkpoint.huggingface.config import hf_config, ignored_settings, model_config_from_hf
from engine.checkpoint.load import load_decoder
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.families import FAMILIES, PRESETS
from tests.checkpoint.huggingface.directory_cases import write_word_tokenizer

# What the published models' config.json say, as far as the architecture goes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "llama3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 131072,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "starcoder2-7b": {
        "architectures": ["Starcoder2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 4608, "initializer_range": 0.018042, "intermediate_size": 18432, "mlp_type": "default",
        "max_position_embeddings": 16384, "model_type": "starcoder2", "norm_epsilon": 1e-05,
        "norm_type": "layer_norm", "num_attention_heads": 36, "num_hidden_layers": 32, "num_key_value_heads": 4,
        "rope_theta": 1000000, "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
        "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1, "use_cache": True,
    },
    "phi3-mini-4k": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0,
        "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "phi4": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0,
        "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 17920,
        "max_position_embeddings": 16384, "model_type": "phi3", "num_attention_heads": 40, "num_hidden_layers": 40,
        "num_key_value_heads": 10, "original_max_position_embeddings": 16384, "pad_token_id": 100349,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 250000,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 100352,
    },
}  # fmt: skip


def without_init(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"init_std": 0.02})


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_configs_are_our_presets(preset: str) -> None:
    read = ModelConfig(**model_config_from_hf(PUBLISHED[preset]))
    assert without_init(read) == ModelConfig(**PRESETS[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_the_way_there_and_back(preset: str) -> None:
    model = ModelConfig(**PRESETS[preset])
    written = hf_config(model, dtype=torch.bfloat16, bos_id=1, eos_id=2)
    assert ModelConfig(**model_config_from_hf(json.loads(json.dumps(written)))) == model
    assert written["torch_dtype"] == "bfloat16"
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("preset", ["llama3.1-8b", "mistral-7b"])
def test_transformers_5_rope_parameters_are_read(preset: str) -> None:
    config = dict(PUBLISHED[preset])
    rope = {"rope_theta": config.pop("rope_theta"), **(config.pop("rope_scaling", None) or {"rope_type": "default"})}
    assert model_config_from_hf(config | {"rope_parameters": rope}) == model_config_from_hf(PUBLISHED[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_reads_what_we_write(preset: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = ModelConfig(**PRESETS[preset])
    written = hf_config(model, dtype=torch.bfloat16, bos_id=None, eos_id=None)
    read = transformers.AutoConfig.for_model(**written)
    assert read.model_type == model.family
    assert (read.num_hidden_layers, read.num_key_value_heads) == (model.num_layers, model.num_kv_heads)
    rope = read.rope_parameters.get("full_attention", read.rope_parameters)
    assert rope["rope_theta"] == model.rope_theta
    assert rope["rope_type"] == ("llama3" if model.rope_scaling else "default")
    assert getattr(read, "sliding_window", None) == model.sliding_window
    assert read.tie_word_embeddings == model.tie_embeddings
    assert read.dtype == torch.bfloat16


def test_missing_keys_mean_what_transformers_means() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 16, "max_position_embeddings": 128,
    }  # fmt: skip
    for name, family in FAMILIES.items():
        ours = model_config_from_hf(sizes | {"architectures": [family.architecture]})
        theirs = transformers.AutoConfig.for_model(name, **sizes)
        assert ours["num_kv_heads"] == (theirs.num_key_value_heads or 16), name
        if family.has_head_dim and theirs.head_dim:  # null of Ministral: transformers needs the key
            assert ours["head_dim"] == theirs.head_dim, name
        assert ours["norm_eps"] == getattr(theirs, family.norm_key), name
        assert ours["tie_embeddings"] == theirs.tie_word_embeddings, name
        assert ours["init_std"] == theirs.initializer_range, name
        if family.windows and "use_sliding_window" not in family.window_keys:
            assert ours["sliding_window"] == theirs.sliding_window, name


UNUSABLE = [
    0,
    -1,
    1.5,
    "x",
    [],
    {},
    [[]],
    [{}],
    True,
    {"rope_type": "yarn", "factor": "8", "mscale": 1, "mscale_all_dim": 2},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_any_type_are_refused_or_read(family: str) -> None:
    """No setting makes the reader fail with anything but a message about config.json."""
    preset = next(name for name in PRESETS if name.startswith("tiny") and PRESETS[name]["family"] == family)
    written = hf_config(ModelConfig(**PRESETS[preset]), dtype=torch.float32, bos_id=1, eos_id=2) | {
        "sliding_window_pattern": 2
    }
    if family.startswith("qwen"):
        written["use_sliding_window"] = True
    for key, value, without in product(written, UNUSABLE, (set(), {"layer_types"})):
        config = {name: seen for name, seen in written.items() if name not in without} | {key: value}
        with contextlib.suppress(CheckpointError, ValidationError):
            ModelConfig.model_validate(model_config_from_hf(config))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\] is not supported; known: LlamaForCausalLM"),
        ({"architectures": None}, "architectures = None"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "architectures"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*; dequantize in transformers and save in bf16"),
        ({"seq_length": 2048}, "seq_length = 2048 is not supported; expected 4096"),
        ({"qkv_bias": True}, "qkv_bias = True is not supported; expected False"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            {"rope_scaling": {"type": "ntk", "factor": 2.0}},
            "type 'ntk' are not supported; LlamaForCausalLM has default",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "type linear without 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "without 'factor'"),
        ({"rope_scaling": "llama3"}, "expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None}, "hidden_size = None; expected a positive integer"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has full_attention, sliding_attention"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24]}}, "mrope_section"),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta is 10000.0"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 1.0}}, "differ; remove one"),
        (
            {"rope_scaling": {"type": "default", "rope_theta": 1.0}, "rope_parameters": {"rope_theta": 2.0}},
            "differ; remove one",
        ),
        (
            {
                "rope_scaling": {"type": "default", "rope_theta": 1.0},
                "rope_parameters": {"type": "default", "rope_theta": 2.0},
            },
            "differ; remove one",
        ),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50\.0 is unknown and may change the model"),
        ({"bias": True, "logits_scaling": 8.0}, "bias = True .*; logits_scaling = 8.0"),
        ({"model_type": "mistral"}, "model_type = 'mistral' is not supported; expected 'llama'"),
    ],
)
def test_what_we_do_not_implement_is_refused_with_the_reason(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        model_config_from_hf(PUBLISHED["llama2-7b"] | changes)


@pytest.mark.parametrize(
    ("preset", "changes", "expected"),
    [
        ("tiny", {"qkv_bias": True}, r"model\.qkv_bias = True cannot be exported as LlamaForCausalLM"),
        ("tiny", {"sliding_window": 8}, "model.sliding_window = 8"),
        ("tiny-qwen2", {"head_dim": 32}, "model.head_dim = 32"),
        ("tiny-starcoder2", {"norm": "rms"}, "model.norm = 'rms'"),
    ],
)
def test_what_the_family_cannot_express_is_refused(preset: str, changes: dict[str, Any], expected: str) -> None:
    model = ModelConfig(**{**PRESETS[preset], **changes})
    with pytest.raises(ConfigError, match=expected):
        hf_config(model, dtype=torch.float32, bos_id=None, eos_id=None)


def test_harmless_settings_are_accepted() -> None:
    config = PUBLISHED["qwen2.5-7b"]
    harmless = {
        "_name_or_path": "x", "temperature": 0.6, "unsloth_version": "2025.1", "eos_token_id": [1, 2],
        "attention_dropout": None, "logits_scaling": None, "layer_types": ["full_attention"] * 28,
    }  # fmt: skip
    assert model_config_from_hf(config | harmless) == model_config_from_hf(config)
    with pytest.raises(CheckpointError, match="qkv_bias = False is unknown"):  # Qwen2 has this bias
        model_config_from_hf(config | {"qkv_bias": False})
    config = PUBLISHED["llama3.1-8b"]
    harmless = {
        "attention_bias": None, "mlp_bias": None, "bias": False, "qkv_bias": False, "seq_length": 131072,
        "use_sdpa": True, "use_flash_attention": True, "gradient_checkpointing": False, "output_router_logits": False,
        "keys_to_ignore_at_inference": ["past_key_values"], "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
        "rope_parameters": config["rope_scaling"] | {"rope_theta": 5e5},
    }  # fmt: skip
    for key, value in harmless.items():
        assert model_config_from_hf(config | {key: value}) == model_config_from_hf(config), key


def test_dropouts_are_said():
    assert ignored_settings(PUBLISHED["starcoder2-7b"]) == [
        "attention_dropout = 0.1, residual_dropout = 0.1, embedding_dropout = 0.1 in config.json (training here has no "
        "dropout)"
    ]
    assert ignored_settings(PUBLISHED["phi4"]) == []


SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WINDOWS = {"mistral": {"sliding_window": 6}, "starcoder2": {"sliding_window": 6}, "qwen3": {"head_dim": 8}}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS |= {
    "ministral": {"sliding_window": 6, "head_dim": 8, "layer_types": [FULL, SLIDING]},
    "phi3": {"sliding_window": 6, "pad_token_id": None},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 8,
}  # fmt: skip
GONE = object()
MUTATIONS: list[tuple[str, Any]] = [
    *[("layer_types", kinds) for kinds in ([FULL, FULL], [SLIDING, SLIDING], [FULL, SLIDING], [SLIDING, FULL])],
    *[("sliding_window", size) for size in (3, 6, None, GONE)],
    *[("use_sliding_window", on) for on in (True, False, GONE)],
    *[("max_window_layers", number) for number in (0, 1, 2, GONE)],
    *[("attention_dropout", 0.1), ("residual_dropout", 0.1), ("embedding_dropout", 0.1), ("hidden_dropout", 0.1)],
    *[("attention_bias", True), ("mlp_bias", True), ("use_bias", False), ("hidden_act", "gelu")],
    *[("bias", False), ("qkv_bias", False)],
    *[("seq_length", 64), ("use_sdpa", True), ("attn_pdrop", 0.0)],
    *[("rope_theta", 500.0), ("rope_theta", GONE), ("partial_rotary_factor", 0.5), ("rope_interleaved", True)],
    *[("rope_parameters", LLAMA3), ("rope_parameters", LLAMA3 | {"original_max_position_embeddings": 8})],
    *[("rope_parameters", {"rope_type": kind, "factor": 2.0}) for kind in ("linear", "dynamic", "yarn", "default")],
    *[("rope_parameters", {"rope_type": "default", "rope_theta": theta}) for theta in (100.0, 1e6)],
    *[("rms_norm_eps", 0.1), ("rms_norm_eps", GONE), ("norm_epsilon", 0.1), ("norm_epsilon", GONE)],
    *[("num_attention_heads", 2), ("num_attention_heads", 8), ("num_key_value_heads", 1), ("num_key_value_heads", 4)],
    *[("num_key_value_heads", GONE), ("num_key_value_heads", None), ("head_dim", 4), ("head_dim", 16)],
    *[("tie_word_embeddings", True), ("tie_word_embeddings", False), ("tie_word_embeddings", GONE)],
    *[("num_hidden_layers", 1), ("hidden_size", 64), ("intermediate_size", 32), ("vocab_size", 97)],
    *[("logit_scale", 0.5), ("attn_logit_softcapping", 2.0), ("final_logit_softcapping", 2.0), ("is_causal", False)],
    *[("embedding_multiplier", 4.0), ("residual_multiplier", 0.5), ("query_pre_attn_scalar", 4), ("max_length", 3)],
    *[("model_type", name) for name in FAMILIES],
    *[("layer_types", kinds) for kinds in (None, [], [FULL], [SLIDING] * 3, ["chunked_attention"] * 2, GONE)],
    *[("rope_parameters", YARN | more) for more in ({}, {"attention_factor": 0.8}, {"factor": 1.0}, {"factor": 2.5})],
    *[("rope_parameters", YARN | {"mscale": 1.0} | more) for more in ({}, {"mscale_all_dim": 0.5})],
    *[("rope_parameters", YARN | {key: value}) for key, value in (("beta_fast", 8.0), ("beta_slow", 2))],
    ("rope_parameters", YARN | {"truncate": False}),
    *[("rope_parameters", LONGROPE | more) for more in ({}, {"factor": 4.0}, {"attention_factor": 1.2})],
    *[("rope_parameters", LONGROPE | {key: value}) for key, value in (("short_factor", [1.0]), ("long_factor", None))],
    ("rope_parameters", LONGROPE | {"rope_type": "su"}),
    *[("rope_parameters", LLAMA3 | more) for more in ({"low_freq_factor": 4.0}, {"factor": 1.0})],
    *[("rope_parameters", {"rope_type": kind, "factor": 1.0}) for kind in ("linear", "dynamic", "ntk", "mrope")],
    *[("rope_scaling", {"type": kind, "factor": 2.0}) for kind in ("linear", "dynamic")],
    *[("original_max_position_embeddings", 8), ("rotary_emb_base", 500.0), ("use_flash_attention_2", True)],
    *[("sliding_window_pattern", number) for number in (1, 2, 3)],
    *[("rope_local_base_freq", 100.0), ("logits_scaling", 4.0), ("attention_multiplier", 0.3), ("no_rope_layers", [0])],
    *[("hidden_activation", "relu"), ("hidden_act", "relu"), ("use_bidirectional_attention", True)],
    *[("use_qk_norm", True), ("qk_layernorm", True), ("clip_qkv", 1.0), ("parallel_attn", True), ("num_experts", 4)],
    *[("lm_head_bias", True), ("interpolate_factor", 2), ("full_attn_mod", 2), ("norm_type", "rms_norm")],
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_setting_is_refused_or_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    """Each in turn, in one directory; none is imported as another model."""
    transformers = pytest.importorskip("transformers")
    no_init_weights = pytest.importorskip("transformers.initialization").no_init_weights
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **SMALL | WINDOWS.get(family, {}))
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path)
    write_word_tokenizer(tmp_path)
    state = made.state_dict()
    before = json.loads((tmp_path / "config.json").read_text())
    tokens = torch.randint(0, 96, (24,))
    right, wrong = [], []
    for key, value in MUTATIONS:
        changed = before | {key: value}
        if value is GONE:
            del changed[key]
        if key in ("rope_theta", "rope_scaling", "rope_local_base_freq"):  # in their old places
            changed |= {"rope_parameters": None}
        if key in ("max_window_layers", "use_sliding_window", "sliding_window_pattern"):  # read without layer_types
            changed.pop("layer_types", None)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            decoder, _ = load_decoder(tmp_path, torch.float32, torch.device("cpu"))
        except CheckpointError:
            continue
        try:
            config = transformers.AutoConfig.from_pretrained(tmp_path)
            with no_init_weights():  # much faster than `from_pretrained`
                theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            theirs.load_state_dict(state)
            with torch.no_grad():
                ours = decoder.logits(decoder(tokens, torch.arange(24), decoder.attend_within((0, 24))))
                torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)
        except Exception as error:  # of transformers, too: it refuses what was accepted
            wrong.append(f"{key} = {value}: {error!r:.300}")
            continue
        right.append(key)
    assert wrong == []
    assert {"rope_theta", "max_length", "sliding_window"} <= {*right, *({"sliding_window"} - before.keys())}


def test_keys_that_conversions_of_other_models_leave() -> None:
    published = PUBLISHED["mistral-7b"]
    assert model_config_from_hf(published | {"pretraining_tp": 1}) == model_config_from_hf(published)
