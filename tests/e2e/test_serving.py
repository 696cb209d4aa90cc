"""Programs of others that take an export as it is: engines that serve it on a CPU, and tools that read its files.

Each test is skipped where its package is not installed; docs/checkpoints.md says what has been tried.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.load import build_decoder
from engine.config.schema import ModelConfig
from engine.data.tokenizers.load import load_tokenizer
from engine.model.families import PRESETS
from engine.model.parameters import logical_shapes
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece, write_chatml_tokenizer
from tests.checkpoint.huggingface.directory_cases import edit_weights, export_, import_, tiny_checkpoint

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(250, (30,), generator=torch.Generator().manual_seed(0))  # within the windows of all presets
Export = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A function that returns the export of a tiny model, in fp32, with a tokenizer and a chat template."""
    sentencepiece = train_sentencepiece(standard_library_texts(20_000), vocab_size=400)
    made: dict[str, Path] = {}

    def make(preset: str) -> Path:
        root = tmp_path_factory.mktemp(preset)
        model = ModelConfig(**{**PRESETS[preset], "vocab_size": 400, "num_layers": 2})
        source = export_(tiny_checkpoint(root / "first", model), root / "hf", dtype=torch.float32)
        edit_weights(source, lambda weights: [one.mul_(0.1) for one in weights.values() if one.dim() == 2])
        if "qwen" in preset:
            write_chatml_tokenizer(source)
            config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
            (source / "tokenizer_config.json").write_text(json.dumps(config))
        else:
            (source / "tokenizer.model").write_bytes(sentencepiece)
        (source / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
        )
        run = import_(source, root / "run")
        assert run.tokenizer_spec is not None
        tokenizer = load_tokenizer(run.tokenizer_spec, fast=False)
        return export(run, tokenizer, root / "out", logical_shapes(model), dtype=torch.float32)

    def cached(preset: str) -> Path:
        if preset not in made:
            made[preset] = make(preset)
        return made[preset]

    return cached


@torch.no_grad()
def our_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [t, v] of an exported model."""
    directory = HuggingFaceDirectory(path)
    directory.require(logical_shapes(directory.model))
    decoder = build_decoder(directory, torch.float32, torch.device("cpu"))
    return decoder.logits(decoder(tokens, torch.arange(len(tokens)), decoder.attend_within((0, len(tokens)))))


def tokenizer_pieces(path: Path, text: str) -> list[str]:
    import sentencepiece

    return list(sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model")).encode(text, out_type=str))


@pytest.mark.parametrize("preset", ["tiny", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"])
def test_ctranslate2_serves_an_export(exported: Export, tmp_path: Path, preset: str) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    out = exported(preset)
    TransformersConverter(str(out)).convert(str(tmp_path / "converted"))
    names = json.loads((tmp_path / "converted" / "vocabulary.json").read_text())
    served = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    theirs = torch.from_numpy(np.array(served.forward_batch([[names[i] for i in TOKENS.tolist()]])))[0]
    ours = our_logits(out, TOKENS)
    torch.testing.assert_close(theirs[:, : ours.shape[1]], ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["tiny", "tiny-llama3", "tiny-mistral"])
def test_the_converter_of_llama_cpp_takes_an_export(exported: Export, tmp_path: Path, preset: str) -> None:
    """Its file, read back by transformers, gives the same logits; the ids are those of the pieces."""
    gguf = pytest.importorskip("gguf")
    converter = shutil.which("convert_hf_to_gguf.py")
    if converter is None:
        pytest.skip("convert_hf_to_gguf.py of llama.cpp is not in PATH")
    out, file = exported(preset), tmp_path / "model.gguf"
    command = [sys.executable, converter, str(out), "--outfile", str(file), "--outtype", "f32"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    written, tokenizer = gguf.GGUFReader(file), load_tokenizer(str(out), fast=False)
    tokens = written.get_field("tokenizer.ggml.tokens").contents()
    assert [tokens[i] for i in tokenizer.encode("a set of")] == tokenizer_pieces(out, "a set of")
    assert written.get_field("tokenizer.ggml.eos_token_id").contents() == tokenizer.eod_id
    if preset == "tiny-llama3":  # transformers does not read the divisors of the frequencies
        config = transformers.AutoConfig.from_pretrained(out)
        scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 10000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        (divisors,) = [one.data for one in written.tensors if one.name == "rope_freqs.weight"]
        torch.testing.assert_close(torch.from_numpy(np.array(divisors)), plain / scaled, rtol=1e-5, atol=0.0)
        return
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS[None]).logits[0], our_logits(out, TOKENS), rtol=1e-4, atol=1e-4)


def test_lm_eval_gives_the_likelihood_of_the_run(exported: Export) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    out = exported("tiny")
    model = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    request = Instance("loglikelihood", {}, ("A checkpoint is a set", " of rectangles"), 0)
    ((likelihood, _),) = model.loglikelihood([request], disable_tqdm=True)
    tokenizer = load_tokenizer(str(out), fast=False)
    context, whole = (
        torch.tensor(tokenizer.encode(text))
        for text in ("A checkpoint is a set", "A checkpoint is a set of rectangles")
    )
    assert whole[: len(context)].equal(context)
    scores = our_logits(out, whole).log_softmax(-1)[:-1].gather(1, whole[1:, None])[len(context) - 1 :]
    assert math.isclose(likelihood, scores.sum().item(), rel_tol=1e-4)


def test_an_adapter_of_peft_is_merged_into_an_export_and_imported(exported: Export, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(exported("tiny"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        expected = adapted.eval()(TOKENS[None]).logits[0]
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert not torch.allclose(our_logits(exported("tiny"), TOKENS), expected, atol=1e-2)
    torch.testing.assert_close(our_logits(tmp_path / "merged", TOKENS), expected, rtol=1e-4, atol=1e-4)
    import_(tmp_path / "merged", tmp_path / "run")


def test_mergekit_averages_two_exports(exported: Export, tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    first, second = exported("tiny"), shutil.copytree(exported("tiny"), tmp_path / "second")
    edit_weights(second, lambda weights: [one.mul_(3.0) for one in weights.values()])
    models: list[dict[str, Any]] = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (first, second)]
    plan = {"merge_method": "linear", "dtype": "float32", "models": models}
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(plan))),
        str(tmp_path / "merged"),
        MergeOptions(),
    )
    merged, source = HuggingFaceDirectory(tmp_path / "merged"), HuggingFaceDirectory(first)
    assert merged.model == source.model
    for name in logical_shapes(source.model):
        torch.testing.assert_close(merged.read(name), 2 * source.read(name))
