"""Selection and checks of operator implementations.

`auto` selects the fastest available implementation and never fails. An implementation requested by name is an error
before the first step if it cannot run. Packages are detected by a module that only the right one has: PyPI's "apex" is
a web toolkit.
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from engine.config.schema import ModelConfig, OpsConfig, PrecisionConfig, RunConfig
from engine.errors import ConfigError
from engine.ops import native
from engine.ops.varlen import Scores, why_not

# name in the config -> distribution, module that identifies it, what to install
_PACKAGES = {
    "apex": ("apex", "amp_C", "NVIDIA's apex, built with its CUDA extensions"),
    "te": ("transformer-engine", "transformer_engine.pytorch", "transformer-engine[pytorch]"),
    "flash_attn": ("flash-attn", "flash_attn.flash_attn_interface", "flash-attn"),  # version 4 has only flash_attn.cute
    "flash_attn_3": ("flash-attn-3", "flash_attn_interface", "FlashAttention-3, the folder hopper/ of flash-attn"),
    "flash_attn_4": ("flash-attn-4", "flash_attn.cute", "flash-attn-4"),
    "cudnn": ("nvidia-cudnn-frontend", "cudnn.sdpa.fwd.torch_op", "nvidia-cudnn-frontend>=1.29"),
}

_NOT_IMPLEMENTATIONS = {"measure", "measured_dir"}

# (setting of `ops`, implementation) -> why a run on a GPU refuses it, and what to set. Tests and benchmarks call these
# implementations directly. A row goes when its implementation is proven; that of the custom FP8 matmul when
# tests/gpu/test_fp8_sm90.py has passed: results are right, and 100 accumulations bit for bit
# (tools/bench/fp8_accumulate.py shows where errors lie).
_NOT_PROVEN = {
    ("fp8_matmul", "triaxis"): (
        "the custom kernel gave wrong values now and then when it added to a gradient, and has not run on a GPU since "
        "it was changed; use cublaslt"
    ),
}


def require_implementations(ops: OpsConfig, device: torch.device) -> None:
    """Check that the implementations requested by name can run on `device`.

    Raises:
        ConfigError: one of them cannot.
    """
    for name, wanted in ops.model_dump(exclude=_NOT_IMPLEMENTATIONS).items():
        if wanted in ("auto", "torch", "sdpa") or name == "fp8_matmul":  # see require_fp8
            continue
        if device.type != "cuda":
            raise ConfigError(f"ops.{name} = {wanted} needs a GPU, and this run is on {device.type}; use auto")
        if wanted == "triaxis" and not native.has_kernels():
            why = f"{native.why_no_kernels()}; see triaxis env"
            raise ConfigError(f"ops.{name} = triaxis needs the kernels of csrc: {why}")
        if wanted in _PACKAGES and not installed(wanted):
            raise ConfigError(f"ops.{name} = {wanted} needs {_PACKAGES[wanted][2]}, which is not installed; use auto")


def require_attention(
    model: ModelConfig, ops: OpsConfig, dtype: torch.dtype, run: RunConfig, device: torch.device
) -> None:
    """Check that the implementation of attention that is requested by name supports the model on this GPU.

    Raises:
        ConfigError: it does not.
    """
    if device.type != "cuda":
        return  # see require_implementations
    capability, impl = torch.cuda.get_device_capability(device), ops.attention
    scores = Scores(model.attention_scale, model.attention_softcap)
    if why := why_not(impl, dtype, model.head_dim, capability, deterministic=run.deterministic, scores=scores):
        raise ConfigError(f"ops.attention = {impl} {why}; use auto")


def require_norm(model: ModelConfig, ops: OpsConfig) -> None:
    """Check that the implementation of norms that is requested by name supports the model.

    Raises:
        ConfigError: it does not.
    """
    if model.zero_centered_norm and ops.norm not in ("auto", "torch"):
        raise ConfigError(
            f"ops.norm = {ops.norm} does not multiply by 1 + weight in fp32, which model.zero_centered_norm = true "
            "needs; use auto"
        )


def require_fp8(precision: PrecisionConfig, ops: OpsConfig, device: torch.device) -> None:
    """Check that the device supports FP8 matmuls of the recipe. A CPU emulates all of them.

    Raises:
        ConfigError: the GPU does not support them, or the implementation is not proven on a GPU.
    """
    if precision.mode != "fp8" or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    has = f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}"
    if found < (8, 9):
        raise ConfigError(f"precision.mode = fp8 needs a GPU of compute capability 8.9 or newer, and {has}; use bf16")
    if precision.recipe == "blockwise" and found != (9, 0):
        raise ConfigError(f"precision.recipe = blockwise needs compute capability 9.0, and {has}; use tensorwise")
    impl = ops.fp8_matmul
    if native.WHY_NOT and (precision.recipe == "blockwise" or impl in ("cublaslt", "triaxis")):
        raise ConfigError(
            f"precision.recipe = {precision.recipe} with ops.fp8_matmul = {impl} needs csrc: {native.WHY_NOT}"
        )
    if impl == ("torch" if precision.recipe == "blockwise" else "triaxis"):
        has = "one scale per tensor" if impl == "torch" else "scales per block"
        raise ConfigError(
            f"ops.fp8_matmul = {impl} has {has}, and cannot run precision.recipe = {precision.recipe}; use cublaslt"
        )
    if why := _NOT_PROVEN.get(("fp8_matmul", impl)):
        raise ConfigError(f"ops.fp8_matmul = {impl} is refused on a GPU: {why}")


def describe_ops(model: ModelConfig, ops: OpsConfig, device: torch.device) -> str:
    """Describe the kernels in use and the implementations that `ops` requests, in one line."""
    plain = {
        "norms with 1 + weight": model.zero_centered_norm,
        "GeGLU": model.activation == "geglu",
        "logits with a softcap": model.logits_softcap is not None,
    }
    if device.type != "cuda":
        kernels = "plain PyTorch (no GPU)"
    elif native.has_kernels():
        without = ", ".join(name for name, used in plain.items() if used)
        kernels = f"csrc kernels, without one for {without}" if without else "csrc kernels"
    else:
        kernels = f"plain PyTorch ({native.why_no_kernels()})"
    wanted = ops.model_dump(exclude=_NOT_IMPLEMENTATIONS)
    return ", ".join([kernels, *(f"{name} {impl}" for name, impl in wanted.items())])


def installed(package: str) -> bool:
    """Whether the package of an implementation, one of `_PACKAGES`, can be imported."""
    try:
        return find_spec(_PACKAGES[package][1]) is not None
    except ImportError:  # of a parent package: not there, or built for another PyTorch
        return False


def package_versions() -> dict[str, str | None]:
    """Return the version of each package of others, by the distribution's name; None if it is not installed."""
    names = {package: name for package, (name, *_) in _PACKAGES.items()}
    return {name: _version(name) if installed(package) else None for package, name in names.items()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown version"
