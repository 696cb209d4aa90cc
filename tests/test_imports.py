"""Who may import whom, and how light `import engine` is."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {  # a room may import what has a lower number, and itself
    "errors": 0,
    "formatting": 0,
    "heartbeat": 1,
    "config": 1,
    "ops": 2,
    "data": 2,
    "parallel": 3,
    "model": 4,
    "plan": 5,
    "checkpoint": 5,
    "optim": 5,
    "generate": 5,
    "train": 6,
    "testing": 7,
    "cli": 8,
    "__main__": 9,
}
DATA_ROOMS = {  # the same within data
    "storage": 0,
    "tokenizers": 0,
    "chat": 1,
    "samples": 1,
    "preprocess": 2,
    "inspection": 2,
}
FILES = sorted((ROOT / "engine").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    for rooms, base in ((ROOMS, "engine"), (DATA_ROOMS, "engine.data")):
        folder = ROOT.joinpath(*base.split("."))
        if not path.is_relative_to(folder):
            continue
        room = room_of(path.relative_to(folder).parts)
        if room == "__init__":
            assert imports(path) == set()
            continue
        for name in imports(path):
            assert not name.startswith("tools"), f"{path} imports {name}"
            if name.startswith(f"{base}."):
                other = name.removeprefix(f"{base}.").split(".")[0]
                allowed = other in (room, "__version__") or rooms[other] < rooms[room]
                assert allowed, f"{path} imports {name}: {room} may only import what is below it"


def test_every_room_has_a_place():
    for rooms, folder in ((ROOMS, ROOT / "engine"), (DATA_ROOMS, ROOT / "engine" / "data")):
        there = {p.name.removesuffix(".py") for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
        assert there - {"__init__", "__pycache__"} == set(rooms)


def test_no_circles():
    """Files import each other in an order, within a room too."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = imports(path)
        graph[module] = {other for name in names for other in (name, name.rpartition(".")[0]) if other in modules}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)


FORBIDDEN = ("pickle", "torch.load", "yaml.load", "marshal", "shelve", "dill")


@pytest.mark.parametrize("folder", ["engine", "tools", "csrc", "examples"])
def test_nothing_that_could_run_foreign_code(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert name not in ("eval", "exec", *FORBIDDEN), f"{path}:{node.lineno} calls {name}"
                assert name.rpartition(".")[2] != "extractall", f"{path}:{node.lineno} calls {name}"
                for option in ("shell", "allow_pickle", "trust_remote_code"):
                    assert keywords.get(option) != "True", f"{path}:{node.lineno} {option}=True"
        names = imports(path)
        assert not (names | {name.split(".")[0] for name in names}) & set(FORBIDDEN), path


def test_importing_the_engine_adds_little_to_importing_torch():
    code = "import time, torch; start = time.perf_counter(); import engine; print(time.perf_counter() - start)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(output) < 0.3
