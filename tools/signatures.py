"""Compare the calls that engine/ops makes to GPU packages of others with the signatures of these packages.

    python tools/signatures.py                       # with signatures.json; offline
    python tools/signatures.py --newest              # with the newest versions on PyPI
    python tools/signatures.py --write [--apex DIR]  # record the oldest and newest versions, and write the docs' table

Most of these packages need a GPU to be imported, or an hour to be compiled. So archives are downloaded without
dependencies, and signatures are read from the source (for an archive of sources, pip runs its setup.py to learn the
version). Our calls do run: functions with the recorded signatures stand in for each package. Alternative considered: a
list of our calls, which would not follow the code.
"""

import argparse
import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

from engine.errors import ConfigError, run_program
from engine.ops import norm, varlen
from engine.ops.attention import attention

RECORDED = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "attention.md"
BEGIN, END = "<!-- versions: written by tools/signatures.py -->", "<!-- versions: end -->"
Signatures = dict[str, str]
"""What our code calls, as "module.function" or "module.Class.method" -> "(arguments)"."""
Recorded = dict[str, dict[str, Signatures]]
"""Package -> version -> signatures."""
TRIED = {
    ("flash-attn-4", "4.0.0b36"): "imported; compiled for sm_90a without a GPU, forward and backward",
    ("nvidia-cudnn-frontend", "1.32.0"): "imported; ran on the meta device, forward and backward",
}
"""(package, version) -> how it was tried besides, by `pytest tests/ops/test_varlen.py` where it is installed."""


@dataclass(frozen=True)
class Package:
    """A package of others.

    Attributes:
        impl: its name in `ops`.
        requirement: versions on PyPI, as in pyproject.toml; None if it is not there.
        sources: what our code calls -> the places of its definition, "file:name", in one of the versions.
    """

    impl: str
    requirement: str | None
    sources: Mapping[str, tuple[str, ...]]
    calls: Callable[[], None]


def _attend(impl: str) -> None:
    """Sequences of one length and documents, with and without a window, with grouped heads."""
    for cu_seqlens in ((0, 4, 8), (0, 3, 3, 8)):
        for window in (None, 2):
            q, k, v = (torch.randn(8, n, 16, device="meta") for n in (4, 2, 2))
            attention(q, k, v, cu_seqlens, window, impl)  # type: ignore[arg-type]


def _norms(impl: str) -> None:
    x, weight, bias = torch.randn(2, 8), torch.ones(8), torch.zeros(8)
    norm.rms_norm(x, weight, 1e-5, impl)  # type: ignore[arg-type]
    norm.layer_norm(x, weight, bias, 1e-5, impl)  # type: ignore[arg-type]


def _te() -> None:
    _attend("te")
    _norms("te")


def _flash_attn(module: str, file: str) -> dict[str, tuple[str, ...]]:
    names = ("flash_attn_func", "flash_attn_varlen_func")
    return {f"{module}.{name}": (f"{file}:{name}",) for name in names}


_TE, _ATTENTION = "transformer_engine/pytorch", "DotProductAttention"
_TE_SOURCES = {
    f"transformer_engine.pytorch.{_ATTENTION}.{method}": (
        f"{_TE}/attention/dot_product_attention/dot_product_attention.py:{_ATTENTION}.{method}",
        f"{_TE}/attention.py:{_ATTENTION}.{method}",
    )
    for method in ("__init__", "forward")
} | {
    f"transformer_engine.pytorch.{name}.__init__": (f"{_TE}/module/{name.lower()}.py:{name}.__init__",)
    for name in ("LayerNorm", "RMSNorm")
}
_APEX = "apex.normalization.fused_layer_norm"
PACKAGES = {
    "flash-attn": Package(
        "flash_attn",
        "flash-attn>=2.7",
        _flash_attn("flash_attn", "flash_attn/flash_attn_interface.py"),
        partial(_attend, "flash_attn"),
    ),
    "flash-attn, hopper/": Package(
        "flash_attn_3",
        "flash-attn>=2.7",
        _flash_attn("flash_attn_interface", "hopper/flash_attn_interface.py"),
        partial(_attend, "flash_attn_3"),
    ),
    "flash-attn-4": Package(
        "flash_attn_4",
        "flash-attn-4>=4.0.0b3",
        _flash_attn("flash_attn.cute", "flash_attn/cute/interface.py"),
        partial(_attend, "flash_attn_4"),
    ),
    "nvidia-cudnn-frontend": Package(
        "cudnn",
        "nvidia-cudnn-frontend>=1.29",
        {"cudnn.sdpa_torch": ("cudnn/sdpa/fwd/torch_op.py:sdpa",)},
        partial(_attend, "cudnn"),
    ),
    "transformer-engine": Package("te", "transformer-engine>=2.1", _TE_SOURCES, _te),
    "apex": Package(
        "apex",
        None,
        {
            f"{_APEX}.{name}": (f"{_APEX.replace('.', '/')}.py:{name}",)
            for name in ("fused_layer_norm_affine", "fused_rms_norm_affine")
        },
        partial(_norms, "apex"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--newest", action="store_true", help="compare with the newest versions on PyPI")
    parser.add_argument("--write", action="store_true", help="record the oldest and newest versions on PyPI")
    parser.add_argument("--apex", type=Path, metavar="DIR", help="with --write: a git clone of NVIDIA's apex")
    options = parser.parse_args(arguments)
    recorded = read()
    if options.write:
        recorded = {title: record(title, package, recorded, options.apex) for title, package in PACKAGES.items()}
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), recorded), encoding="utf-8")
    if options.newest:
        try:
            recorded = {title: newest(title, package, recorded) for title, package in PACKAGES.items()}
        except Unreachable as error:
            print(f"skipped: the newest versions were not compared, as PyPI cannot be reached: {error}")
    problems = misfits(recorded)
    for title, versions in recorded.items():
        print(f"{title}: {', '.join(versions)}")
    print("\n".join(problems) or "all calls fit")
    return 1 if problems else 0


def read() -> Recorded:
    """Read the recorded signatures."""
    recorded: Recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    return recorded


# Do our calls fit?


def misfits(recorded: Recorded) -> list[str]:
    """Describe the packages that our code does not call as they are recorded."""
    found = []
    for title, versions in recorded.items():
        for version, signatures in versions.items():
            if missing := [name for name in PACKAGES[title].sources if name not in signatures]:
                found.append(f"{title} {version} lacks {', '.join(missing)}")
                continue
            try:
                with standing_in(signatures):
                    PACKAGES[title].calls()
            except (TypeError, AttributeError, ImportError) as error:
                found.append(f"{title} {version}: {error}")
    return found


@contextmanager
def standing_in(signatures: Signatures) -> Iterator[None]:
    """Put modules in the place of a package, whose functions accept what `signatures` say and return their input."""
    modules: dict[str, ModuleType] = {}
    for path, text in signatures.items():
        name, method = path, ""
        if path.endswith((".__init__", ".forward")):
            name, _, method = path.rpartition(".")
        module_name, _, name = name.rpartition(".")
        for end in (m.start() for m in re.finditer(r"\.|$", module_name)):
            modules.setdefault(module_name[:end], ModuleType(module_name[:end]))
        module = modules[module_name]
        if method:
            base = vars(module).get(name) or type(name, (_StandIn,), {"signatures": {}})
            setattr(module, name, base)
            vars(base)["signatures"][method] = signature(text)
        else:
            setattr(module, name, partial(_call, signature(text), path))
    kept = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    _forget_modules()
    try:
        yield
    finally:
        _forget_modules()
        for name, module_before in kept.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before


def _forget_modules() -> None:
    """Drop the modules of Transformer Engine that our code keeps."""
    varlen._te_attention.cache_clear()
    norm._te_norm.cache_clear()


def _call(expected: inspect.Signature, path: str, *args: Any, **kwargs: Any) -> Any:
    try:
        expected.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{path}{expected} {error}") from None
    return (args[0], None) if kwargs.get("return_lse") else args[0]


class _StandIn(nn.Module):
    """A module of Transformer Engine."""

    signatures: dict[str, inspect.Signature]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _call(self.signatures["__init__"], f"{type(self).__name__}.__init__", self, *args, **kwargs)
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.signatures:
            _call(self.signatures["forward"], f"{type(self).__name__}.forward", self, *args, **kwargs)
        return args[0]


def signature(text: str) -> inspect.Signature:
    """Parse "(a, b=..., *, c)", the form in which signatures are recorded."""
    arguments = ast.parse(f"def f{text}: pass").body[0].args  # type: ignore[attr-defined]
    kinds, found = inspect.Parameter, []
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    for i, argument in enumerate(positional):
        kind = kinds.POSITIONAL_ONLY if i < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        found.append(kinds(argument.arg, kind, default=... if i >= first_default else kinds.empty))
    if arguments.vararg:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else ...))
    if arguments.kwarg:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


# What versions are there, and what are their signatures?


class Unreachable(Exception):
    """pip reached no package index."""


def record(title: str, package: Package, recorded: Recorded, apex: Path | None) -> dict[str, Signatures]:
    """Return the signatures of the oldest and the newest version on PyPI; of apex, those of a clone."""
    if package.requirement is None:
        return recorded.get(title, {}) if apex is None else {_commit(apex): _read_clone(apex, package)}
    known = _versions(package.requirement)
    return {version: _download(package, version) for version in dict.fromkeys((known[0], known[-1]))}


def newest(title: str, package: Package, recorded: Recorded) -> dict[str, Signatures]:
    """Return the signatures of the newest version on PyPI; what is recorded is not downloaded."""
    if package.requirement is None:
        return recorded.get(title, {})
    version = _versions(package.requirement)[-1]
    return {version: recorded.get(title, {}).get(version) or _download(package, version)}


def _versions(requirement: str) -> list[str]:
    """List the versions on PyPI that meet a requirement, oldest first."""
    wanted = Requirement(requirement)
    listed = _pip("index", "versions", "--pre", wanted.name).partition("Available versions:")[2].splitlines()[0]
    found = {Version(text.strip()) for text in listed.split(",")}
    return [str(version) for version in sorted(found) if wanted.specifier.contains(version, prereleases=True)]


def _download(package: Package, version: str) -> Signatures:
    name = Requirement(package.requirement or "").name
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", "--no-deps", "--no-build-isolation", "--quiet", "--dest", folder, f"{name}=={version}")
        (archive,) = Path(folder).iterdir()
        return signatures_in(_archive_reader(archive), package)


def _pip(*arguments: str) -> str:
    """Run pip and return what it prints. flash-attn's setup.py is told to compile nothing."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise Unreachable(f"pip {' '.join(arguments)}: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def _archive_reader(archive: Path) -> Callable[[str], str | None]:
    """Return a function that reads a file of a wheel, or of an archive of sources, which has a folder around."""
    if archive.suffix == ".whl":
        wheel = zipfile.ZipFile(archive)
        return lambda path: wheel.read(path).decode() if path in wheel.namelist() else None
    sources = tarfile.open(archive)  # noqa: SIM115 until the returned function is gone
    around = archive.name.removesuffix(".tar.gz")

    def read_member(path: str) -> str | None:
        try:
            file = sources.extractfile(f"{around}/{path}")
        except KeyError:
            return None
        return None if file is None else file.read().decode()

    return read_member


def _commit(clone: Path) -> str:
    return "commit " + subprocess.check_output(["git", "-C", clone, "rev-parse", "--short", "HEAD"], text=True).strip()


def _read_clone(clone: Path, package: Package) -> Signatures:
    def read_committed(path: str) -> str | None:
        result = subprocess.run(["git", "-C", clone, "show", f"HEAD:{path}"], capture_output=True, text=True)
        return None if result.returncode else result.stdout

    return signatures_in(read_committed, package)


def signatures_in(read_file: Callable[[str], str | None], package: Package) -> Signatures:
    """Read the signatures of `package.sources`; leave out what is not defined, or not exported by its module."""
    found: Signatures = {}
    for path, places in package.sources.items():
        for place in places:
            file, _, name = place.partition(":")
            text = read_file(file)
            definition = None if text is None else _definition(ast.parse(text), name.split("."))
            if definition is not None and _is_exported(path, file, read_file):
                found[path] = _without_values(definition)
                break
    return found


def _definition(tree: ast.AST, names: Sequence[str]) -> ast.FunctionDef | None:
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == names[0]:
            if len(names) > 1:
                return _definition(node, names[1:])
            return node if isinstance(node, ast.FunctionDef) else None
    return None


def _is_exported(path: str, file: str, read_file: Callable[[str], str | None]) -> bool:
    """Whether the module from which our code takes a name contains it."""
    module, _, name = re.sub(r"\.(__init__|forward)$", "", path).rpartition(".")
    folder = module.replace(".", "/")
    if file.endswith(f"{folder}.py"):
        return True
    return re.search(rf"\b{name}\b", read_file(f"{folder}/__init__.py") or "") is not None


def _without_values(definition: ast.FunctionDef) -> str:
    """Format a signature without types and without the values of defaults, which are ... instead."""
    arguments = definition.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [None if default is None else ast.Constant(...) for default in arguments.kw_defaults]
    return f"({ast.unparse(arguments)})"


# The table of the docs.


def with_table(text: str, recorded: Recorded) -> str:
    """Return a document with the table of versions between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{PAGE.name}: expected a line {BEGIN} and, after it, a line {END}")
    rows = ["| `ops` | package | version | tried |", "|---|---|---|---|"]
    for title, versions in recorded.items():
        for version in versions:
            tried = f"signature; {how}" if (how := TRIED.get((title, version))) else "signature"
            rows.append(f"| `{PACKAGES[title].impl}` | {title} | {version} | {tried} |")
    return f"{before}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{after}"


if __name__ == "__main__":
    run_program(main)
