"""The operators as torch sees them: schemas, fake tensors, and mutated arguments."""

import pytest
import torch

from engine.ops.rope import rope_tables

ops = torch.ops.triaxis


def cases():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 64), torch.randn(64), torch.randn(64)
    mean, rstd = torch.randn(4), torch.rand(4)
    cos, sin = rope_tables(torch.arange(4), 8, 10_000.0)
    heads = torch.randn(4, 6, 8)
    labels, one = torch.randint(0, 64, (4,)), torch.ones(1)
    fp8, rows = [torch.randn(16, 32).to(torch.float8_e4m3fn) for _ in range(2)], torch.ones(1, 16)
    angles = torch.rand(16, 16)
    settings = (1e-3, 0.9, 0.95, 1e-8, 0.1)
    return {
        "norm_forward": [
            (x, x, weight, bias, 1e-5, True),
            (x, None, weight, None, 1e-5, False),
            (x, x, weight, None, 1e-5, False, one.clone()),
        ],
        "norm_backward": [
            (x, x, x, weight, mean, rstd, True),
            (x, None, x, weight, mean[:0], rstd, False),
            (x, None, x, weight, mean[:0], rstd, False, False, torch.zeros(64)),
            (x, None, x, weight, mean, rstd, True, True, torch.zeros(64), torch.zeros(64)),
        ],
        "norm_forward_fp8": [
            (x, x, weight, bias, 1e-5, True, "block_1x128", None, None),
            (x, None, weight, None, 1e-5, False, "tensorwise", one, one.clone()),
        ],
        "swiglu_forward": [(x,)],
        "swiglu_forward_amax": [(x, one.clone())],
        "swiglu_forward_fp8": [
            (x, "block_1x128", None, None),
            (x, "tensorwise", one, one.clone()),
            (torch.randn(16, 64), "tensorwise", one, one.clone(), True),
        ],
        "swiglu_backward": [(x[:, :32], x)],
        "swiglu_backward_amax": [(x[:, :32], x, one.clone())],
        "swiglu_backward_fp8": [
            (torch.randn(16, 128), torch.randn(16, 256), "block_1x128", None, None),
            (torch.randn(16, 32), torch.randn(16, 64), "tensorwise", one, one.clone()),
        ],
        "rope": [(heads, cos, sin, True)],
        "rope_qk": [(heads, cos, sin, 2)],
        "rope_qk_backward": [(heads[:, :2], heads[:, 2:4], heads[:, 4:], cos, sin)],
        "rope_qk_backward_amax": [(heads[:, :2], heads[:, 2:4], heads[:, 4:], cos, sin, one.clone())],
        "rope_qk_backward_fp8": [
            (*(torch.randn(16, n, 32) for n in (4, 2, 2)), angles, angles, "block_1x128", None, None),
            (*(torch.randn(16, n, 32) for n in (4, 2, 2)), angles, angles, "tensorwise", one, one.clone()),
        ],
        "cross_entropy_statistics": [(x, labels, 0)],
        "cross_entropy_gradient_": [(x.clone(), labels, rstd, rstd, 0, 0.0)],
        "embedding_backward_": [(torch.zeros(9, x.shape[1]), labels, x)],
        "adamw_": [
            (weight.clone(), bias, bias.clone(), bias.square(), bias.bfloat16(), one, one, one * 0, *settings),
            (weight.clone(), bias, bias.clone(), bias.square(), None, one, None, None, *settings),
        ],
        "square_sum": [([weight],), ([weight, bias[1:]],)],
        "amax_": [(one.clone(), x)],
        "quantize": [
            (torch.randn(16, 32), torch.float8_e5m2, "tensorwise", False, True, None, one.clone(), False),
            (torch.randn(16, 32), torch.float8_e4m3fn, "tensorwise", True, True, one, one.clone(), False),
            (torch.randn(16, 32), torch.float8_e5m2, "block_1x128", True, False, None, None, True),
            (torch.randn(16, 32), torch.float8_e4m3fn, "block_128x128", False, True, None, None, False),
        ],
        "transpose_fp8": [(fp8[0], one, "tensorwise"), (fp8[0], rows, "block_1x128")],
        "fp8_matmul_sm90": [
            (*fp8, rows, rows, "block_1x128", "block_1x128", torch.bfloat16),
            (*fp8, rows, torch.ones(1, 4), "block_1x128", "block_128x128", torch.float32),
        ],
        "fp8_matmul_sm90_add_": [(torch.zeros(16, 16), *fp8, rows, rows, "block_1x128", "block_1x128")],
    }


@pytest.mark.parametrize("name", sorted(cases()))
def test_opcheck(emulated, name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name.startswith(("fp8", "transpose_fp8")):
        checks.remove("test_schema")  # it does arithmetic on arguments, which PyTorch has none of for FP8
    for arguments in cases()[name]:
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=checks)


def test_every_operator_is_here(emulated):
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("triaxis::")
    }
    assert names - {"fp8_matmul", "fp8_matmul_add_"} == set(cases())  # these two run only on a GPU
