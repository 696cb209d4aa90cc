"""`triaxis env`: show the machine, the installed packages, and the implementation of each operator."""

import argparse
import platform
from collections.abc import Iterator, Sequence

import torch

import engine
from engine.cli.arguments import program_parser
from engine.cli.version import commit, csrc_build
from engine.ops import native
from engine.ops.choice import package_versions

DESCRIPTION = "Show the machine, the installed packages, and the implementation of each operator on this machine."
_KERNELS = ("norm", "swiglu", "rope", "embedding", "cross_entropy", "adamw", "grad_norm", "quantize")
_ON_CPU = {
    "norm": "custom RMSNorm in three passes, PyTorch's LayerNorm",
    "linear": "training measures MKL and oneDNN for each kind of fp32 matmul, else oneDNN for all but the smallest",
    "attention": "PyTorch's scaled_dot_product_attention, documents of one length at a time",
    "swiglu": "PyTorch, saving only the input",
    "rope": "PyTorch, each half written in place",
    "embedding": "PyTorch, gradients added to the rows of the tokens",
    "cross_entropy": "fused with the output projection, in chunks of tokens",
    "adamw": "PyTorch's fused AdamW",
    "grad_norm": "PyTorch, row by row",
    "quantize": "PyTorch",
}


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command, which has no options."""
    return program_parser("env", DESCRIPTION)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    parser().parse_args(arguments)
    print("\n".join(environment()))


def environment() -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"triaxis               {engine.__version__} ({commit()})"
    yield f"python                {platform.python_version()} on {platform.machine()}"
    yield f"torch                 {torch.__version__}, {_cuda()}"
    yield f"csrc                  {csrc_build()}"
    for name, found in package_versions().items():
        yield f"{name:21} {found or 'not installed'}"
    yield ""
    yield "operator       here"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, plain in _ON_CPU.items():
        yield f"{name:14} {_choice(name, plain, device)}"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return f"built with CUDA {torch.version.cuda}, no GPU" if torch.version.cuda else "built without CUDA"
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}))
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.device_count()} × {names}"


def _choice(name: str, plain: str, device: str) -> str:
    if device == "cpu":
        return f"{plain} (no GPU)" if name in _KERNELS else plain
    if name in _KERNELS:
        return "csrc kernel" if native.has_kernels() else f"PyTorch ({native.why_no_kernels()})"
    return {
        "linear": "cuBLAS, weight gradients into the fp32 main gradient",
        "attention": "the fastest of PyTorch's and of the packages above, measured at the start",
    }[name]
