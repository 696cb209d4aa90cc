"""The calls of engine/ops fit the recorded signatures of other packages, and the docs name the recorded versions."""

import inspect
import sys
import zipfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from engine.ops import norm, varlen
from tools import signatures
from tools.signatures import PACKAGES, PAGE, TRIED, misfits, read, signature, signatures_in, standing_in, with_table

ROOT = Path(__file__).parents[2]
FLASH_ATTN_4 = "flash_attn.cute.flash_attn_varlen_func"


def test_every_call_fits_the_oldest_and_the_newest_version():
    recorded = read()
    assert recorded.keys() == PACKAGES.keys()
    assert all(len(versions) == (1 if title == "apex" else 2) for title, versions in recorded.items())
    assert misfits(recorded) == []


def test_the_page_names_the_recorded_versions():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, read()) == page, "run python tools/signatures.py --write"
    assert all(version in read()[title] for title, version in TRIED)


def test_ranges_are_those_of_the_extras():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in PACKAGES.values():
        if package.requirement is not None:
            name, _, oldest = package.requirement.partition(">=")
            assert f'"{name}>={oldest}"' in pyproject or f'"{name}[pytorch]>={oldest}"' in pyproject


@pytest.mark.parametrize(
    "changed, problem",
    [
        ("(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=...)", "'deterministic'"),
        ("(q, k, v, cu_seqlens, max_seqlen, causal=..., window_size=..., deterministic=...)", "'cu_seqlens'"),
        (None, "lacks flash_attn.cute.flash_attn_varlen_func"),
    ],
)
def test_a_call_that_does_not_fit_is_found(changed, problem):
    kept = dict(read()["flash-attn-4"]["4.0.0b3"])
    del kept[FLASH_ATTN_4]
    recorded = {"flash-attn-4": {"5.0": kept | ({} if changed is None else {FLASH_ATTN_4: changed})}}
    (found,) = misfits(recorded)
    assert found.startswith("flash-attn-4 5.0")
    assert problem in found


def test_methods_of_transformer_engine_are_compared():
    recorded = read()["transformer-engine"]["2.1.0"]
    changed = recorded | {"transformer_engine.pytorch.DotProductAttention.forward": "(self, query, key, value)"}
    (found,) = misfits({"transformer-engine": {"3.0": changed}})
    assert "DotProductAttention.forward" in found


def test_nothing_stays_behind():
    before = dict(sys.modules)
    misfits(read())
    assert {name for name in sys.modules if name.startswith(("flash_attn", "transformer_engine", "cudnn"))} == {
        name for name in before if name.startswith(("flash_attn", "transformer_engine", "cudnn"))
    }
    assert varlen._te_attention.cache_info().currsize == norm._te_norm.cache_info().currsize == 0


def test_signatures_are_read_from_an_archive(tmp_path):
    """Names that a module does not export are not there; nothing is run."""
    package = PACKAGES["nvidia-cudnn-frontend"]
    source = "raise SystemExit\ndef sdpa(q: int, k=3, *rest, scale: float = 1.0, causal, **more): return q\n"
    for exported in (True, False):
        path = tmp_path / f"{exported}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("cudnn/sdpa/fwd/torch_op.py", source)
            wheel.writestr("cudnn/__init__.py", "LAZY = {'sdpa_torch': 0}" if exported else "")
        found = signatures_in(signatures._archive_reader(path), package)
        expected = {"cudnn.sdpa_torch": "(q, k=..., *rest, scale=..., causal, **more)"}
        assert found == (expected if exported else {})


def test_recorded_signatures_are_parsed():
    def f(a, /, b, c=..., *d, e, f=..., **g): ...

    assert signature("(a, /, b, c=..., *d, e, f=..., **g)") == inspect.signature(f)


@pytest.mark.parametrize("title", PACKAGES)
def test_what_is_installed_is_what_was_recorded(title):
    try:
        found = read()[title].get(version(title))
    except PackageNotFoundError:
        pytest.skip(f"{title} is not installed")
    if found is None:
        pytest.skip(f"{title} {version(title)} is not recorded")
    for path, text in found.items():
        module, _, name = path.removesuffix(".__init__").removesuffix(".forward").rpartition(".")
        value = getattr(import_module(module), name)
        value = getattr(value, path.rpartition(".")[2]) if path.endswith((".__init__", ".forward")) else value
        kinds = {p.name: (p.kind, p.default is p.empty) for p in inspect.signature(value).parameters.values()}
        recorded = signature(text).parameters.values()
        assert kinds == {p.name: (p.kind, p.default is p.empty) for p in recorded}


def test_without_pypi_the_newest_versions_are_skipped(monkeypatch, capsys):
    def unreachable(requirement):
        raise signatures.Unreachable("pip index versions: no route to host")

    monkeypatch.setattr(signatures, "_versions", unreachable)
    assert signatures.main(["--newest"]) == 0
    assert "skipped: the newest versions were not compared, as PyPI cannot be reached: pip" in capsys.readouterr().out


def test_a_new_version_that_our_calls_do_not_fit_fails(monkeypatch, capsys):
    monkeypatch.setattr(signatures, "_versions", lambda requirement: ["9.0"])
    monkeypatch.setattr(signatures, "_download", lambda package, version: dict.fromkeys(package.sources, "()"))
    assert signatures.main(["--newest"]) == 1
    assert "flash-attn-4 9.0: flash_attn.cute.flash_attn_func()" in capsys.readouterr().out


def test_modules_are_put_back():
    with standing_in({"json.dumps": "()"}):
        assert import_module("json") is not inspect
    assert import_module("json").dumps([]) == "[]"
