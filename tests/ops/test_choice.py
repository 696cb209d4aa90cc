import pytest
import torch

from engine.config.schema import OpsConfig
from engine.errors import ConfigError
from engine.ops import choice, native
from engine.ops.attention import attention_reference, choose_impl
from engine.ops.choice import installed, require_implementations

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_and_pytorch_run_anywhere():
    for device in (CPU, GPU):
        require_implementations(OpsConfig(), device)
        require_implementations(OpsConfig(norm="torch", attention="sdpa"), device)


@pytest.mark.parametrize("ops", [{"norm": "triaxis"}, {"norm": "apex"}, {"attention": "varlen"}])
def test_what_needs_a_gpu_is_refused_without_one(ops):
    ((name, wanted),) = ops.items()
    with pytest.raises(ConfigError, match=f"ops.{name} = {wanted} needs a GPU, and this run is on cpu; use auto"):
        require_implementations(OpsConfig(**ops), CPU)


@pytest.mark.parametrize(
    "ops, missing",
    [
        ({"norm": "apex"}, "NVIDIA's apex"),
        ({"norm": "te"}, "transformer-engine"),
        ({"attention": "flash_attn"}, "flash-attn"),
        ({"attention": "te"}, "transformer-engine"),
    ],
)
def test_a_package_that_is_asked_for_by_name_and_missing_is_named(ops, missing):
    (wanted,) = ops.values()
    if installed(wanted):
        require_implementations(OpsConfig(**ops), GPU)
        return
    with pytest.raises(ConfigError, match=f"needs {missing}.*, which is not installed; use auto"):
        require_implementations(OpsConfig(**ops), GPU)


def test_kernels_that_were_not_built_are_named(monkeypatch):
    monkeypatch.setattr(native, "WHY_NOT", "csrc was not built")
    monkeypatch.setattr(native, "_HAS_KERNELS", False)
    with pytest.raises(ConfigError, match="needs the kernels of csrc: csrc was not built"):
        require_implementations(OpsConfig(norm="triaxis"), GPU)


def test_the_apex_of_pypi_is_not_taken_for_nvidias(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda module: object() if module == "apex" else None)
    assert not installed("apex")


def test_a_cpu_attends_by_sdpa_whatever_the_documents():
    q = torch.randn(6, 1, 8)
    assert choose_impl("auto", q, (0, 2, 6), None) == choose_impl("auto", q, (0, 6), 3) == "sdpa"
    assert attention_reference(q, q, q, (0, 2, 6)).shape == q.shape


@pytest.mark.skipif(not (torch.cuda.is_available() and installed("apex")), reason="needs a GPU and NVIDIA's apex")
def test_apex_agrees():
    agree("apex")


@pytest.mark.skipif(not (torch.cuda.is_available() and installed("te")), reason="needs a GPU and Transformer Engine")
def test_transformer_engine_agrees():
    agree("te")


def agree(impl: str) -> None:
    from engine.ops.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

    x, weight, bias = (torch.randn(shape, device="cuda") for shape in ((64, 1024), (1024,), (1024,)))
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, impl=impl), rms_norm_reference(x, weight, 1e-5))
    torch.testing.assert_close(
        layer_norm(x, weight, bias, 1e-5, impl=impl), layer_norm_reference(x, weight, bias, 1e-5)
    )
