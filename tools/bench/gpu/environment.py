"""Prepares a machine for the stages and describes it: packages and library from a bundle, device, versions, what lacks.

    python -m tools.bench.gpu.environment --json environment.json [--bundle DIR]

The file has {"machine": …, "lacks": {need: why}}: a stage whose need lacks is not started.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tools.bench.gpu import library
from tools.bench.kernel_table import source
from tools.bench.results import save

NEEDS = ("gpu", "fp8", "hopper", "kernels", "transformers", "liger", "nccl")
PACKAGES = (
    "numpy",
    "triton",
    "transformers",
    "liger-kernel",
    "flash-attn",
    "flash-attn-4",
    "transformer-engine",
    "apex",
)
GPU_FIELDS = ("name", "uuid", "driver_version", "vbios_version", "power.limit", "clocks.max.sm", "clocks.max.memory",
              "memory.total", "ecc.mode.current", "mig.mode.current", "compute_mode")  # fmt: skip


def main() -> int:
    """Run the program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the description there")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="made by gpu.sh --make-bundle")
    parser.add_argument("--commit", help="commit that is measured, if git is not available")
    options = parser.parse_args()
    problems, made_from = [], {}
    if options.bundle is not None:
        made_from = json.loads((options.bundle / "bundle.json").read_text(encoding="utf-8"))
        problems += install(options.bundle / "wheels", made_from["required"], made_from["optional"])
    has_gpu = torch.cuda.is_available()
    bundled = made_from.get("csrc_hash")
    try:
        origin = library.provide(options.bundle, bundled) if has_gpu else "left as it is, because there is no GPU"
    except subprocess.CalledProcessError as error:
        origin = f"not built: {error}"
    lacks = missing(origin)
    machine = source(options.commit) | describe() | {"library": origin}
    save(options.json, {"machine": machine, "rows": {}, "lacks": lacks, "problems": problems})
    for name, value in machine.items():
        print(f"{name:12} {value}")
    for name, why in lacks.items():
        print(f"lacks {name}: {why}")
    print("\n".join(problems), flush=True)
    return 1 if "engine" in lacks else 0


def install(wheels: Path, required: list[str], optional: list[str]) -> list[str]:
    """Install from the folder what this environment lacks; return what could not be installed."""
    problems = []
    for package in (*required, *optional):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        command += ["--find-links", str(wheels), package]
        settings = {"PIP_BREAK_SYSTEM_PACKAGES": "1"}  # a rented machine's Python is nobody else's
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
        if done.returncode:
            problems.append(f"pip install {package}: {' '.join(done.stderr.split())[-300:]}")
    importlib.invalidate_caches()
    return problems


def missing(origin: str) -> dict[str, str]:
    """Return what this machine lacks of `NEEDS`, or "engine", and why."""
    lacks: dict[str, str] = {}
    try:
        from engine.ops import native
    except ImportError as error:
        return dict.fromkeys((*NEEDS, "engine"), f"the engine cannot be imported: {error}; see --make-bundle")
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        found = f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
        lacks |= {} if capability == (9, 0) else {"hopper": f"{found}, not 9.0"}
        lacks |= {} if capability >= (8, 9) else {"fp8": f"{found}, less than 8.9"}
    else:
        lacks |= dict.fromkeys(("gpu", "fp8", "hopper"), "torch finds no GPU")
    if not native.has_kernels():
        lacks["kernels"] = f"{native.why_no_kernels()} ({origin})"
    for need, module in {"transformers": "transformers", "liger": "liger_kernel"}.items():
        if importlib.util.find_spec(module) is None:
            lacks[need] = f"the package {module.replace('_', '-')} is not installed; see --make-bundle"
    return lacks


def describe() -> dict[str, Any]:
    """Describe the device and the versions of what measures."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions |= {name: found for name in PACKAGES if (found := _version(name))}
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions |= {"cudnn": torch.backends.cudnn.version(), "nccl": nccl}
    return {"device": _nvidia_smi(), "versions": versions, "cpu": f"{os.cpu_count()} cores of {platform.machine()}"}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(GPU_FIELDS, done.stdout.splitlines()[0].split(", "), strict=True))


if __name__ == "__main__":
    sys.exit(main())
