"""Who may import whom, and how light `import engine` is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {  # a package may import what has a lower number, and itself
    "config": 1,
    "errors": 0,
    "ops": 2,
    "data": 2,
    "parallel": 3,
    "model": 4,
    "plan": 5,
    "checkpoint": 5,
    "optim": 5,
    "train": 6,
    "testing": 7,
    "__main__": 7,
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    package = path.relative_to(ROOT / "engine").parts[0].removesuffix(".py")
    if package == "__init__":
        assert imports(path) == set()
        return
    for name in imports(path):
        assert not name.startswith("tools"), f"{path} imports {name}"
        if name.startswith("engine."):
            other = name.split(".")[1]
            allowed = other == package or other == "__version__" or LEVELS[other] < LEVELS[package]
            assert allowed, f"{path} imports {name}: {package} may only import what is below it"


def test_every_package_has_a_level():
    there = {p.name.removesuffix(".py") for p in (ROOT / "engine").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert there - {"__init__", "__pycache__"} == set(LEVELS)


FORBIDDEN = ("pickle", "torch.load", "yaml.load", "marshal", "shelve", "dill")


@pytest.mark.parametrize("folder", ["engine", "tools"])
def test_nothing_that_could_run_foreign_code(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert name not in ("eval", "exec", *FORBIDDEN), f"{path}:{node.lineno} calls {name}"
                for option in ("shell", "allow_pickle", "trust_remote_code"):
                    assert keywords.get(option) != "True", f"{path}:{node.lineno} {option}=True"
        assert not {name.split(".")[0] for name in imports(path)} & set(FORBIDDEN), path


def test_importing_the_engine_adds_little_to_importing_torch():
    code = "import time, torch; start = time.perf_counter(); import engine; print(time.perf_counter() - start)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(output) < 0.3
