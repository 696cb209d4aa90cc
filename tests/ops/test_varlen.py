"""Limits and calls of the implementations of attention that need a GPU; signatures: tests/tools/test_signatures.py."""

import os
import subprocess
import sys

import pytest
import torch

from engine.ops.attention import attention
from engine.ops.choice import installed
from engine.ops.varlen import STANDARD_SCORES, Scores, power_of_two, why_not
from tools.signatures import read, standing_in

BF16, HOPPER = torch.bfloat16, (9, 0)
NEWEST = {title: list(versions.values())[-1] for title, versions in read().items()}


@pytest.mark.parametrize("impl", ["varlen", "flash_attn", "flash_attn_3", "flash_attn_4", "cudnn", "te"])
def test_a_7b_in_bf16_on_hopper_can_use_all(impl):
    for deterministic in (False, True):
        assert why_not(impl, BF16, 128, HOPPER, deterministic=deterministic) is None
    assert why_not(impl, torch.float32, 128, HOPPER, deterministic=False) == (
        "needs bf16 or fp16, and precision.mode computes in float32"
    )


@pytest.mark.parametrize(
    "impl, head_dim, capability, deterministic, why",
    [
        ("varlen", 256, (8, 0), True, None),
        ("varlen", 128, (7, 5), False, "needs compute capability 8.0, and this GPU has 7.5"),
        ("varlen", 12, HOPPER, False, "a head size of at most 256 and a multiple of 8, and model.head_dim = 12"),
        ("flash_attn", 264, HOPPER, False, "a head size of at most 256 and a multiple of 8, and model.head_dim = 264"),
        ("flash_attn_3", 128, (10, 0), False, "needs compute capability 9.0 to 9.x, and this GPU has 10.0"),
        ("flash_attn_3", 256, HOPPER, False, None),
        (
            "flash_attn_3",
            256,
            HOPPER,
            True,
            "is not deterministic with heads larger than 192, and model.head_dim = 256",
        ),
        ("flash_attn_4", 128, (8, 0), False, "needs compute capability 9.0 to 11.x, and this GPU has 8.0"),
        ("flash_attn_4", 128, (12, 0), False, "needs compute capability 9.0 to 11.x, and this GPU has 12.0"),
        ("flash_attn_4", 192, HOPPER, False, None),
        ("flash_attn_4", 192, (10, 0), False, "at most 128, or 256, on this GPU, and model.head_dim = 192"),
        ("flash_attn_4", 256, (10, 0), False, None),
        ("cudnn", 136, HOPPER, False, "a head size of at most 128 and a multiple of 8, and model.head_dim = 136"),
        ("sdpa", 12, (7, 0), True, None),
    ],
)
def test_limits(impl, head_dim, capability, deterministic, why):
    found = why_not(impl, BF16, head_dim, capability, deterministic=deterministic)
    assert found is None if why is None else why in found


@pytest.mark.parametrize("impl", ["varlen", "cudnn", "te"])
def test_a_softcap_is_refused_where_there_is_none(impl):
    scores = Scores(None, 50.0)
    assert "attention_softcap = 50.0" in why_not(impl, BF16, 128, HOPPER, deterministic=False, scores=scores)
    assert why_not("flash_attn", BF16, 128, HOPPER, deterministic=False, scores=scores) is None


def calls_of(monkeypatch, title, module, name, cu_seqlens, window, scores=STANDARD_SCORES):
    """The arguments with which attention calls a function of a package that is not here."""
    given = []
    with standing_in(NEWEST[title]):
        function = getattr(sys.modules[module], name)
        monkeypatch.setattr(sys.modules[module], name, lambda *a, **k: (given.append((a, k)), function(*a, **k))[1])
        impl = {"flash-attn-4": "flash_attn_4", "nvidia-cudnn-frontend": "cudnn"}[title]
        q, k, v = (torch.randn(cu_seqlens[-1], n, 16) for n in (4, 2, 2))
        assert attention(q, k, v, cu_seqlens, window, impl, scores).shape == q.shape
    ((args, kwargs),) = given
    return args, kwargs


def test_documents_of_one_length_are_a_batch_for_flash_attention(monkeypatch):
    args, kwargs = calls_of(monkeypatch, "flash-attn-4", "flash_attn.cute", "flash_attn_func", (0, 4, 8), 4)
    assert [x.shape for x in args] == [(2, 4, 4, 16), (2, 4, 2, 16), (2, 4, 2, 16)]
    assert kwargs == {"causal": True, "deterministic": False}  # a window as long as the sequences is none


def test_scores_are_given_to_the_kernels(monkeypatch):
    given = calls_of(monkeypatch, "flash-attn-4", "flash_attn.cute", "flash_attn_func", (0, 8), None, Scores(0.7, 50.0))
    assert given[1] == {"causal": True, "deterministic": False, "softmax_scale": 0.7, "softcap": 50.0}
    given = calls_of(monkeypatch, "nvidia-cudnn-frontend", "cudnn", "sdpa_torch", (0, 8), None, Scores(0.7))
    assert given[1]["scale"] == 0.7


def test_documents_and_a_window_for_flash_attention(monkeypatch):
    given = calls_of(monkeypatch, "flash-attn-4", "flash_attn.cute", "flash_attn_varlen_func", (0, 3, 3, 8), 2)
    kwargs = given[1]
    assert kwargs["cu_seqlens_q"].tolist() == kwargs["cu_seqlens_k"].tolist() == [0, 3, 8]  # without the empty one
    assert kwargs["cu_seqlens_q"].dtype == torch.int32
    assert (kwargs["max_seqlen_q"], kwargs["max_seqlen_k"], kwargs["window_size"]) == (5, 5, (1, 0))


@pytest.mark.parametrize("cudnn, offsets", [(92500, [0, 3, 4, 9, 9]), (92499, [0, 3, 4, 9]), (None, [0, 3, 4, 9])])
def test_cudnn_gets_few_different_shapes(monkeypatch, cudnn, offsets):
    """Numbers of documents, where cuDNN can have empty ones, and longest lengths are powers of two; the window counts
    the token itself.
    """
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    given = calls_of(monkeypatch, "nvidia-cudnn-frontend", "cudnn", "sdpa_torch", (0, 3, 3, 4, 9), 2)
    kwargs = given[1]
    assert kwargs["cu_seqlens_q"].tolist() == kwargs["cu_seqlens_kv"].tolist() == offsets
    assert (kwargs["max_seqlen_q"], kwargs["max_seqlen_kv"], kwargs["window_left"]) == (8, 8, 2)
    assert kwargs["return_lse"]
    assert [power_of_two(i) for i in (1, 2, 3, 4, 5, 4096, 4097)] == [1, 2, 4, 4, 8, 4096, 8192]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_torch_on_the_meta_device(kv_heads, window):
    q, k, v = (torch.randn(8, n, 16, device="meta", dtype=BF16, requires_grad=True) for n in (4, kv_heads, kv_heads))
    out = attention(q, k, v, (0, 3, 3, 8), window, "varlen")
    out.sum().backward()
    assert [x.shape for x in (out, q.grad, k.grad)] == [q.shape, q.shape, k.shape]


@pytest.mark.skipif(not installed("cudnn"), reason="needs nvidia-cudnn-frontend")
@pytest.mark.parametrize("window", [None, 3])
def test_cudnn_on_the_meta_device(window):
    q, k, v = (torch.randn(8, n, 16, device="meta", dtype=BF16, requires_grad=True) for n in (4, 2, 2))
    out = attention(q, k, v, (0, 3, 3, 8), window, "cudnn")
    out.sum().backward()
    assert [x.shape for x in (out, q.grad, k.grad, v.grad)] == [q.shape, q.shape, k.shape, v.shape]


COMPILE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from flash_attn.cute import interface
from engine.ops import varlen
with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
    q, k, v = (torch.empty(8192, n, 128, dtype=torch.bfloat16, device="cuda") for n in (8, 2, 2))
    for cu_seqlens, window in (((0, 8192), None), ((0, 3000, 8192), None), ((0, 3000, 8192), 1024)):
        offsets = torch.empty(len(cu_seqlens), dtype=torch.int32, device="cuda")
        varlen.device_ints = lambda values, device: offsets
        assert varlen.varlen_attention("flash_attn_4", q, k, v, cu_seqlens, window).shape == q.shape
        documents = {} if len(cu_seqlens) == 2 else {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets,
            "max_seqlen_q": 5192, "max_seqlen_k": 5192}
        tensors = (q, k, v) if documents else (x.unflatten(0, (-1, 8192)) for x in (q, k, v))
        q_, k_, v_ = tensors
        lse = torch.empty((8, 8192) if documents else (1, 8, 8192), device="cuda")
        reach = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        grads = interface._flash_attn_bwd(q_, k_, v_, q_, q_, lse, causal=True, **documents, **reach)
        assert [x.shape for x in grads[:3]] == [q_.shape, k_.shape, v_.shape]
"""


@pytest.mark.skipif(not installed("flash_attn_4"), reason="needs flash-attn-4")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_attention.py runs it")
def test_flash_attention_4_compiles_for_hopper_without_a_gpu():
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    subprocess.run([sys.executable, "-c", COMPILE], env={**os.environ, **target}, check=True)
