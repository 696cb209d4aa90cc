import pytest

from engine.config.schema import ModelConfig
from engine.errors import ConfigError
from engine.model.families import FAMILIES, PRESETS, family_of
from engine.model.parameters import logical_shapes, parameter_table

PUBLISHED = {  # from the model cards and the safetensors metadata on the hub
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "phi3-mini-4k": 3_821_079_552,
    "phi4": 14_659_507_200,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "starcoder2-7b": 7_173_923_840,
    "olmo2-7b": 7_298_617_344,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "granite3-8b": 8_170_848_256,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_have_their_published_size(preset):
    table = parameter_table(ModelConfig(**PRESETS[preset]))
    if not preset.startswith("tiny"):
        assert table.num_parameters == PUBLISHED[preset]
    names = [tensor.name for tensor in table.logical()]
    paths = [parameter.path for parameter in table.parameters]
    assert len(set(names)) == len(names)
    assert len(set(paths)) == len(paths)


def test_fields_that_an_older_checkpoint_lacks_mean_what_it_was():
    new = {"mlp_bias", "window_layers", "rope_local_theta", "partial_rotary_factor"}
    for preset in ("tiny", "tiny-llama3", "tiny-mistral", "tiny-starcoder2"):
        model = ModelConfig(**PRESETS[preset])
        stored = model.model_dump(exclude=new)
        (stored["rope_scaling"] or {}).pop("rope_type", None)
        assert ModelConfig(**stored) == model
    assert ModelConfig(**PRESETS["tiny"] | {"output_bias": True}).mlp_bias


def test_matrices_decay_and_vectors_do_not():
    for preset in PRESETS:
        for tensor in parameter_table(ModelConfig(**PRESETS[preset])).logical():
            assert tensor.weight_decay == (len(tensor.shape) == 2), tensor.name


def test_only_what_multiplies_counts_as_multiplying():
    untied = parameter_table(ModelConfig(**PRESETS["tiny"]))
    multiplying = {tensor.name for tensor in untied.logical() if tensor.counts_in_flops}
    assert "model.embed_tokens.weight" not in multiplying
    assert "lm_head.weight" in multiplying
    tied = parameter_table(ModelConfig(**PRESETS["tiny-starcoder2"]))
    assert "model.embed_tokens.weight" in {tensor.name for tensor in tied.logical() if tensor.counts_in_flops}


def test_fused_parameters_are_logical_tensors_one_after_another():
    shapes = logical_shapes(ModelConfig(**PRESETS["tiny"]))
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == (32, 64)
    (qkv,) = [
        p
        for p in parameter_table(ModelConfig(**PRESETS["tiny"])).parameters
        if p.path == "layers.0.attention.qkv.weight"
    ]
    assert [tensor.name.split(".")[-2] for tensor in qkv.tensors] == ["q_proj", "k_proj", "v_proj"]
    assert qkv.shape == (64 + 32 + 32, 64)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_row_is_whole(family):
    """Its parameter names fit its activation, and a preset makes its name known to configurations."""
    assert len(family.up_names) == {"swiglu": 2, "geglu": 2, "gelu": 1}[family.fields["activation"]]
    assert family.sizes
    for preset in family.sizes:
        model = ModelConfig(**PRESETS[preset])
        assert family_of(model.family) is family
        names = [name for name in logical_shapes(model) if ".layers.0.mlp." in name and name.endswith("weight")]
        expected = [f"model.layers.0.mlp.{part}.weight" for part in (*family.up_names, family.down_name)]
        assert names == expected


def test_an_unknown_family():
    with pytest.raises(ConfigError, match=r"model\.family = 'lama' is unknown; known: llama, mistral, ministral"):
        family_of("lama")
