from unittest.mock import patch

import pytest
import torch
import transformers

from engine.config.schema import ModelConfig, ParallelConfig
from engine.generate.cache import KeyValueCache
from engine.generate.decoding import Sampling, generate
from engine.model.attention import attend_within
from engine.model.decoder import Decoder
from engine.model.families import stored_tensors
from engine.model.layers import Parameters
from engine.model.parameters import kv_replicas, parameter_table, whole_model
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import Layout, World
from engine.testing.distributed import run_ranks, world_of
from engine.testing.models import logical_gradients, logical_state, new_decoder, new_parameters, tiny_config

CONFIGS = {
    "tiny": "LlamaConfig",
    "tiny-llama3": "LlamaConfig",
    "tiny-mistral": "MistralConfig",
    "tiny-ministral": "MinistralConfig",
    "tiny-phi3": "Phi3Config",
    "tiny-qwen2": "Qwen2Config",
    "tiny-qwen3": "Qwen3Config",
    "tiny-starcoder2": "Starcoder2Config",
    "tiny-olmo2": "Olmo2Config",
    "tiny-gemma2": "Gemma2Config",
    "tiny-gemma3": "Gemma3TextConfig",
    "tiny-granite": "GraniteConfig",
}


def reference_model(preset: str, model: ModelConfig) -> transformers.PreTrainedModel:
    """The same architecture in transformers, described independently of our own export."""
    fields = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "sliding_window": model.sliding_window,
        "attention_dropout": 0.0,
        "attn_implementation": "eager",
    }
    fields["norm_epsilon" if model.norm == "layer" else "rms_norm_eps"] = model.norm_eps
    if model.norm == "layer":
        fields |= {"use_bias": True, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    if model.rope_scaling is not None:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling.factor,
            "low_freq_factor": model.rope_scaling.low_freq_factor,
            "high_freq_factor": model.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": model.rope_scaling.original_max_position,
        }
    if model.window_layers is not None:
        fields["layer_types"] = [
            "sliding_attention" if layer in model.window_layers else "full_attention"
            for layer in range(model.num_layers)
        ]
    if "gemma" in model.family:
        fields |= {
            "query_pre_attn_scalar": 16 if preset == "tiny-gemma2" else 256,
            "attn_logit_softcapping": model.attention_softcap,
            "final_logit_softcapping": model.logits_softcap,
            "pad_token_id": None,  # whose embedding has no gradient there
            "rope_local_base_freq": model.rope_local_theta,
        }
    if model.family == "granite":
        fields |= {
            "embedding_multiplier": model.embedding_scale,
            "residual_multiplier": model.residual_scale,
            "attention_multiplier": model.attention_scale,
            "logits_scaling": model.logits_scaling,
        }
    if model.family == "phi3":
        fields |= {"partial_rotary_factor": 0.75, "pad_token_id": None}
    config = getattr(transformers, CONFIGS[preset])(**fields)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def hidden_tokens(length: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("preset", CONFIGS)
def test_logits_and_gradients_equal_those_of_transformers(preset):
    model = tiny_config(preset, init_std=0.1)
    parameters = new_parameters(model)
    state = logical_state(model, parameters)
    reference = reference_model(preset, model)
    stored = stored_tensors(model, state)
    loaded = {name: torch.cat([state[part] for part in parts]) for name, parts in stored.items()}
    missing = reference.load_state_dict(loaded, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys in ([], ["lm_head.weight"])
    reference.tie_weights()

    decoder = Decoder(model, Parameters(parameters))
    tokens = hidden_tokens(97, model.vocab_size)  # longer than the sliding window of 32
    labels = tokens.roll(-1)
    hidden = decoder(tokens, torch.arange(97), attend_within((0, 97), model))
    expected = reference(tokens[None]).logits[0]
    torch.testing.assert_close(decoder.logits(hidden), expected, rtol=1e-4, atol=1e-4)

    loss = decoder.loss(tokens, torch.arange(97), labels, torch.ones(97), (0, 97))
    expected_loss = torch.nn.functional.cross_entropy(expected, labels, reduction="sum")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected_loss.backward()
    theirs, ours = dict(reference.named_parameters()), logical_gradients(model, parameters)
    for name, parts in stored.items():
        grad, other = torch.cat([ours[part] for part in parts]), theirs[name].grad
        distance = (grad - other).norm() / other.norm().clamp(min=1e-6)
        assert distance < 1e-4, (name, distance)


@pytest.mark.parametrize("preset", ["tiny-olmo2", "tiny-gemma2", "tiny-gemma3", "tiny-granite"])
def test_greedy_text_equals_that_of_transformers(preset):
    """Beyond the sliding window."""
    model = tiny_config(preset, init_std=0.2, tie_embeddings=False)
    parameters = new_parameters(model)
    reference = reference_model(preset, model)
    reference.load_state_dict(logical_state(model, parameters), strict=False)
    reference.tie_weights()
    prompt = hidden_tokens(25, model.vocab_size)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(prompt[None], **settings)[0, 25:].tolist()
    assert list(generate(Decoder(model, Parameters(parameters)), prompt.tolist(), 20, Sampling())) == expected
    assert len(set(expected)) > 1


def test_documents_do_not_see_each_other():
    model = tiny_config()
    decoder = new_decoder(model)
    tokens = hidden_tokens(50, model.vocab_size)
    positions = torch.cat((torch.arange(20), torch.arange(30)))
    attend = attend_within((0, 20, 50), model)
    together = decoder(tokens, positions, attend)
    alone = decoder(tokens[20:], torch.arange(30), attend_within((0, 30), model))
    torch.testing.assert_close(together[20:], alone, rtol=1e-5, atol=1e-5)
    changed = tokens.clone()
    changed[3] = (changed[3] + 1) % model.vocab_size
    assert torch.equal(decoder(changed, positions, attend)[20:], together[20:])
    assert not torch.equal(decoder(changed, positions, attend)[:20], together[:20])


@torch.no_grad()
def test_layers_without_a_window_attend_to_all():
    model = tiny_config("tiny-mistral", init_std=0.1, num_layers=2, window_layers=(1,), sliding_window=8)
    decoder, tokens = new_decoder(model), hidden_tokens(30, 257)
    some = decoder(tokens, torch.arange(30), decoder.attend_within((0, 30)))
    for layer, windows in ((0, (0, 1)), (1, ())):
        decoder.config = model.model_copy(update={"window_layers": windows})
        other = decoder(tokens, torch.arange(30), decoder.attend_within((0, 30)))
        torch.testing.assert_close(other[:8], some[:8])
        assert not torch.allclose(other[8:], some[8:]), layer


@pytest.mark.parametrize("preset", ["tiny", "tiny-mistral", "tiny-qwen3", "tiny-starcoder2", "some windows"])
@torch.no_grad()
def test_generation_with_a_cache_equals_the_whole_sequence(preset):
    if preset == "some windows":
        model = tiny_config("tiny-mistral", init_std=0.1, window_layers=(1, 2))
    else:
        model = tiny_config(preset, init_std=0.1)
    decoder = new_decoder(model)
    tokens = hidden_tokens(60, model.vocab_size)
    whole = decoder(tokens, torch.arange(60), attend_within((0, 60), model))
    cache = KeyValueCache(model, 1, 60, torch.float32, torch.device("cpu"))
    parts = []
    for first, last in ((0, 40), (40, 41), (41, 42), (42, 60)):
        positions, attend = cache.extend(range(1), last - first)
        assert positions.tolist() == list(range(first, last))
        parts.append(decoder(tokens[first:last], positions, attend))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


Trained = tuple[list[float], list[torch.Tensor], int]


def train_plain_and_compiled(preset: str, tp: int, recompute: str) -> tuple[Trained, Trained]:
    model = tiny_config(preset, num_layers=3)
    world = world_of(Layout(tp=tp), kv_replicas=kv_replicas(model, tp))
    plain = ParallelConfig(tp=tp, recompute=recompute)
    return train(model, world, plain), train(model, world, plain.model_copy(update={"compile": True}))


def train(model: ModelConfig, world: World, parallel: ParallelConfig) -> Trained:
    """Losses of a few batches of different documents, the gradients, and how many graphs were compiled."""
    from torch._dynamo.utils import counters

    parameters = ShardedParameters(parameter_table(model, tp=world.tp), torch.float32, world, bucket_size=20_000)
    parameters.initialize(1)
    compile_quickly = torch.compile  # the compiler's front and its autograd, but no machine code, which takes long
    with patch.object(torch, "compile", lambda function: compile_quickly(function, backend="aot_eager")):
        decoder = Decoder(
            model, Parameters(parameters.by_path, parameters.sinks), whole_model(model), world.tp, parallel
        )
    tokens, losses = hidden_tokens(32, model.vocab_size), []
    parameters.begin_step()
    for documents in ((0, 32), (0, 5, 32), (0, 7, 20, 32), (0, 1, 2, 3, 32)):
        parameters.flow.is_last_pass = documents[1] == 1
        loss = decoder.loss(tokens, torch.arange(32), tokens, torch.ones(32), documents)
        loss.backward()
        losses.append(loss.item())
    assert not any(bucket.incomplete for bucket in parameters.buckets)
    return losses, [bucket.grad for bucket in parameters.buckets], counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("preset", "tp", "recompute"), [("tiny-gemma2", 1, "selective"), ("tiny-olmo2", 2, "full")])
def test_compiled_layers_compute_the_same(preset, tp, recompute):
    for plain, compiled in run_ranks(tp, train_plain_and_compiled, preset, tp, recompute):
        (expected_losses, expected, no_graphs), (losses, gradients, graphs) = plain, compiled
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)
        assert no_graphs == 0
        assert 0 < graphs <= 9  # for the parts of a layer, and not for every layer or cut into documents
