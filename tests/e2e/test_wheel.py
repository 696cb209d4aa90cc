"""The wheel alone: in an empty directory, from raw text to a model that chats, with no command but `triaxis`.

TRIAXIS_WHEEL is a folder with the wheel to test; by default one is built, without CUDA kernels.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.e2e.commands import ENVIRONMENT, ROOT
from tests.e2e.pages import executed, run_blocks

PAGE = (ROOT / "docs/start.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel to test; objects of csrc that are compiled already are used again."""
    if "TRIAXIS_WHEEL" in os.environ:
        (found,) = Path(os.environ["TRIAXIS_WHEEL"]).glob("*.whl")
        return found
    return build(tmp_path_factory.mktemp("wheel"), TRIAXIS_CUDA="off")


def build(folder: Path, **settings: str) -> Path:
    """Build a wheel, with nothing in it from earlier builds."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder / "build", "egg_info", "--egg-base"]
    command += [folder, "bdist_wheel", "--dist-dir", folder / "dist"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stderr, encoding="utf-8")
    (found,) = (folder / "dist").glob("*.whl")
    return found


class Person:
    """Someone in an empty directory, with an environment in which only the wheel has the engine."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        venv.create(folder / "venv", symlinks=True)
        self.bin = folder / "venv/bin"
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
        (packages / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")  # torch and the like
        install = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--no-index", wheel], check=True, capture_output=True)
        self.environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
        self.environment["PATH"] = f"{self.bin}:{self.environment['PATH']}"

    def triaxis(self, *words: object, code: int = 0, stdin: str = "") -> str:
        """What a command prints."""
        command = [self.bin / "triaxis", *map(str, words)]
        done = subprocess.run(
            command, cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=120, input=stdin
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def person(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Person:
    return Person(tmp_path_factory.mktemp("person"), wheel)


def test_the_page_of_the_first_hour_leads_from_raw_text_to_a_model_that_chats(person):
    said = run_blocks(executed(PAGE), person.home, person.environment)
    assert "Traceback" not in said
    assert "next       triaxis inspect data/mine_text_document\n" in said
    assert "token ids are below 1,000" in said
    assert "2 ranks = tp 1 × pp 1 × dp 2" in said and "2 ranks = tp 2 × pp 1 × dp 1" in said
    assert "finished: 60 steps" in said and "finished: 90 steps" in said
    assert "Some layers of a model." in said.partition("tokens to train")[2]
    assert (person.home / "models/mine/model.safetensors").exists()
    answered = person.triaxis("chat", "runs/mine-chat", "--max-new-tokens", 4, stdin="Who are you?\n/quit\n")
    assert answered.strip()


def test_a_wrong_setting_is_refused_on_the_last_line(person):
    assert person.triaxis("train", "tiny", "--trian.steps", 9, code=64).splitlines()[-1].startswith("exit 64: ")


def test_the_wheel_holds_recipes_presets_and_its_commit(person, wheel):
    assert wheel.name == "triaxis-0.1.0-0cpu-py3-none-linux_x86_64.whl"
    assert "operators without CUDA kernels: TRIAXIS_CUDA=off" in (wheel.parents[1] / "said").read_text()
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"engine/recipes/{path.name}" for path in (ROOT / "examples/configs").glob("*.yaml")}
    assert {"engine/_csrc.so", "engine/COMMIT", "engine/py.typed", *recipes} <= names
    assert not [name for name in names if not name.startswith(("engine/", "triaxis-0.1.0.dist-info/"))]
    version = person.triaxis("--version")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"triaxis 0.1.0 ({commit[:12] or 'unknown'}" in version
    assert "csrc    operators, without CUDA kernels (" in version
    assert "qwen3-8b" in person.triaxis("config")
    assert person.triaxis("config", "tiny", "--source") == (ROOT / "examples/configs/tiny.yaml").read_text()


def test_a_wheel_without_a_compiler_says_so_and_has_another_name(tmp_path):
    wheel = build(tmp_path, CXX="/nowhere/g++", PATH="/nowhere")
    assert wheel.name == "triaxis-0.1.0-py3-none-any.whl"
    said = (tmp_path / "said").read_text()
    assert "warning: csrc is not built: no C++ compiler (CXX, g++ or c++). Left out: the compiled operators" in said
    assert "engine/_csrc.so" not in zipfile.ZipFile(wheel).namelist()


def test_the_source_distribution_builds_the_same_package(wheel, tmp_path):
    folder = tmp_path / "sdist"
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", folder]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    source = folder / "triaxis-0.1.0"
    for part in (
        "csrc/build.py",
        "docs/sft.md",
        "examples/pretrain_7b.sh",
        "tests/run.sh",
        "tools/prove.py",
        "engine/COMMIT",
    ):
        assert (source / part).exists(), part
    assert not list(source.rglob("*.so"))
    plain = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", folder / "dist"]
    subprocess.run(plain, cwd=source, env=ENVIRONMENT | {"CXX": "/nowhere/g++", "PATH": "/nowhere"}, check=True)
    (again,) = (folder / "dist").glob("*.whl")
    ours, theirs = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    for name in ours.namelist():
        if name.startswith("engine/") and name != "engine/_csrc.so":
            assert theirs.read(name) == ours.read(name), name
