import pytest
import torch

from engine.config.schema import OpsConfig, RunConfig
from engine.errors import ConfigError
from engine.ops import choice, native
from engine.ops.choice import installed, require_attention, require_implementations
from engine.testing.models import tiny_config

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
        ({"attention": "flash_attn_4"}, "flash-attn-4"),
        ({"attention": "cudnn"}, "nvidia-cudnn-frontend>=1.29"),
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


@pytest.mark.parametrize(
    "installed_modules, found",
    [
        ({"flash_attn.cute"}, ["flash_attn_4"]),  # version 4 brings flash_attn without the functions of version 2
        ({"flash_attn.flash_attn_interface"}, ["flash_attn"]),
        ({"flash_attn_interface"}, ["flash_attn_3"]),
        ({"cudnn.sdpa.fwd.torch_op"}, ["cudnn"]),
    ],
)
def test_versions_of_flash_attention_are_told_apart(monkeypatch, installed_modules, found):
    monkeypatch.setattr(choice, "find_spec", lambda module: object() if module in installed_modules else None)
    assert [name for name in ("flash_attn", "flash_attn_3", "flash_attn_4", "cudnn") if installed(name)] == found


def test_a_package_built_for_another_pytorch_is_not_installed(monkeypatch):
    def find_spec(module):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(choice, "find_spec", find_spec)
    assert not installed("flash_attn")


def test_attention_that_does_not_support_the_model_is_refused(monkeypatch):
    model, run = tiny_config(head_dim=256), RunConfig()
    given = (torch.bfloat16, run, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    message = "ops.attention = cudnn needs a head size of at most 128 .* model.head_dim = 256; use auto"
    with pytest.raises(ConfigError, match=message):
        require_attention(model, OpsConfig(attention="cudnn"), *given)
    for impl in ("auto", "sdpa", "varlen", "flash_attn_4"):
        require_attention(model, OpsConfig(attention=impl), *given)
    deterministic = RunConfig(deterministic=True)
    with pytest.raises(ConfigError, match="flash_attn_3 is not deterministic with heads larger than 192"):
        require_attention(model, OpsConfig(attention="flash_attn_3"), torch.bfloat16, deterministic, GPU)
    require_attention(model, OpsConfig(attention="cudnn"), torch.bfloat16, run, CPU)  # refused for another reason


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
