"""Every family of models there and back, and trained: beside transformers, which writes, loads and trains the same.

A new row of `FAMILIES` joins by itself.
"""

import itertools
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from engine.checkpoint.huggingface.config import hf_config
from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.exporting import export
from engine.checkpoint.huggingface.files import INDEX
from engine.checkpoint.huggingface.importing import import_directory
from engine.checkpoint.load import load_decoder
from engine.checkpoint.reader import Checkpoint
from engine.config.schema import ModelConfig, ParallelConfig
from engine.data.tokenizers.load import load_tokenizer
from engine.model.families import FAMILIES, PRESETS, stored_tensors
from engine.model.parameters import logical_shapes
from engine.testing.models import tiny_config
from engine.testing.parity import Case, Problem, measure
from engine.testing.runs import run_config
from engine.testing.tokenizers import write_chatml_tokenizer
from engine.train.inputs import open_data

transformers = pytest.importorskip("transformers")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARD_BYTES = {"one file": 1 << 30, "shards": 40_000}
TOKENS = 48  # longer than the windows of 32
STEPS = 4
CASES = [Case(micro=2), Case(ParallelConfig(tp=2), micro=2), Case(ParallelConfig(pp=2), micro=2)]


def small(family: str, **changes: Any) -> ModelConfig:
    """The smallest preset of a family, smaller; the vocabulary has the tokenizer's 259 tokens, and one more."""
    preset = next(name for name in FAMILIES[family].sizes if name.startswith("tiny"))
    if "window_layers" in PRESETS[preset]:
        changes["window_layers"] = (0,)
    return tiny_config(preset, num_layers=2, vocab_size=260, **changes)


def their_model(model: ModelConfig) -> Any:
    """A model of transformers with random weights, none of them near what it is initialized to."""
    torch.manual_seed(0)
    config = hf_config(model, dtype=torch.float32, bos_id=None, eos_id=0, pad_id=None)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return theirs.eval()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Fail on a warning of Python or of transformers' logs."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert not said


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_there_and_back(family: str, kv_heads: int, tied: bool, tmp_path: Path) -> None:
    """With files of every dtype, whole and in shards: bitwise the same tensors. transformers loads the last of them, in
    fp16 and in shards, without a warning and computes the same logits.
    """
    model = small(family, num_kv_heads=kv_heads, tie_embeddings=tied)
    theirs = their_model(model)
    for dtype, (name, shard_bytes) in itertools.product(DTYPES, SHARD_BYTES.items()):
        folder = tmp_path / f"{dtype} {name}"
        theirs.to(dtype).save_pretrained(folder / "hf", max_shard_size=shard_bytes)
        write_chatml_tokenizer(folder / "hf")
        (folder / "hf/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        source = HuggingFaceDirectory(folder / "hf")
        assert source.model.model_copy(update={"init_std": model.init_std}) == model
        checkpoint = Checkpoint(import_directory(source, folder / "run", logical_shapes(model)))
        out = export(
            checkpoint, load_tokenizer(folder / "hf"), folder / "out", logical_shapes(model),
            dtype=dtype, shard_bytes=shard_bytes,
        )  # fmt: skip
        assert all((path / INDEX).exists() == (name == "shards") for path in (folder / "hf", out))
        same_tensors(folder / "hf", out)

    tokens = torch.randint(0, model.vocab_size, (TOKENS,))
    decoder, _ = load_decoder(folder / "run", torch.float32, torch.device("cpu"))
    hidden = decoder(tokens, torch.arange(TOKENS), decoder.attend_within((0, TOKENS)))
    with no_warnings():
        again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(decoder.logits(hidden), again(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)
    if (kv_heads, tied) == (2, False):  # once per family
        with no_warnings():
            tokenizer = transformers.AutoTokenizer.from_pretrained(out)
            pipe = transformers.pipeline("text-generation", model=str(out))
        assert tokenizer("é <|im_end|>")["input_ids"] == load_tokenizer(out).encode_special("é <|im_end|>")[0]
        assert pipe("a", max_new_tokens=2)


def same_tensors(first: Path, second: Path) -> None:
    """Check that two directories have the same names, dtypes and bits."""
    ours, theirs = (
        {
            name: tensor
            for file in path.glob("*.safetensors")
            for name, tensor in safetensors.torch.load_file(file).items()
        }
        for path in (first, second)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_transformers_with_adamw(family: str, tmp_path: Path) -> None:
    """From its weights, in one process, tensor-parallel and pipelined: losses and the weights after the last step."""
    model = small(family)
    theirs = their_model(model)
    theirs.save_pretrained(tmp_path / "hf")
    problem = Problem(
        "tiny", {"model.from_hf": tmp_path / "hf", "data.document_mask": False, "batch.global": 4}, steps=STEPS
    )
    outcomes = measure(tmp_path, problem, CASES)
    losses, weights = train_theirs(theirs, model, tmp_path)
    for case, outcome in zip(CASES, outcomes, strict=True):
        torch.testing.assert_close(torch.tensor(outcome.losses[:STEPS]), torch.tensor(losses), rtol=1e-5, atol=0)
        for name, parts in stored_tensors(model, outcome.parameters).items():
            ours = torch.cat([outcome.parameters[part] for part in parts])
            distance = (ours - weights[name]).norm() / weights[name].norm()
            assert distance < 1e-5, (str(case), name, distance)


def train_theirs(theirs: Any, model: ModelConfig, directory: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on the batches of the run, with its optimizer's settings; the losses and the weights."""
    config = run_config(directory, "--optimizer.eps=1e-4", "--optimizer.clip_grad=2.0")
    data = open_data(config, "train", load_tokenizer("byte"))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": config.optimizer.weight_decay},
            {"params": [p for p in theirs.parameters() if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        samples = [data.sample(4 * step + i) for i in range(4)]
        tokens, labels = (torch.tensor(np.stack([getattr(s, key) for s in samples])) for key in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(theirs.state_dict())
