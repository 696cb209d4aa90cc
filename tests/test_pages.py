"""What the documents say about files, commands and extras is true of the tree."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "csrc/README.md", "engine/**/README.md", "tools/**/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it names what is gone
)
SUFFIXES = (".py", ".sh", ".cu", ".cuh", ".cpp", ".h", ".toml")
LINK = re.compile(r"\]\(([^)#\s]+)")
SPAN = re.compile(r"`([^`\n]+)`")
NOT_IN_CODE = {  # placeholders, variables of torchrun, and names in the worked example of a change
    "NAME_reference", "NNODES", "NODE_RANK", "MASTER_ADDR", "attention_softcap", "final_softcap", "has_softcap",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
}  # fmt: skip
IMPORTED_AS = {"types-PyYAML": "yaml", "pytest-xdist": "pytest", "nvidia-cudnn-frontend": "cudnn"}
PROGRAMS = {
    "nvidia-cuda-cuobjdump": "cuobjdump",
    "nvidia-cuda-nvdisasm": "nvdisasm",
    "mkdocs-material": "mkdocs",
}  # packages of these


FOLDERS = ("engine", "tests", "tools", "csrc", "docs", "examples", ".github")
FILES = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
FILES += [f"/{path.name}" for path in ROOT.iterdir()]


def named_files(page: Path) -> set[str]:
    """Files and folders of the repository that a page names in code spans, perhaps without the folders above them."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    words = {word for span in SPAN.findall(prose) for word in span.split()}
    paths = {word for word in words if word.endswith(SUFFIXES) or (word.split("/")[0] in FOLDERS and "/" in word)}
    made = ("data/", "runs/", "models/", "build/")  # what programs write
    return {path for path in paths if path[0] not in ".-" and not path.startswith(made) and "NAME" not in path}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page):
    for path in named_files(page):
        assert any(fnmatch(file, f"*/{path.rstrip('/')}") for file in FILES), f"{page.name} names {path}"
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_identifier_that_a_page_names_exists():
    """Code spans like `train_step`, `Fp8State.begin_step` or `MODEL_FILES`."""
    code = [ROOT / file[1:] for file in FILES if file.startswith(("/engine/", "/csrc/", "/tools/", "/tests/"))]
    code = [file for file in code if file.suffix in SUFFIXES and file != Path(__file__)]
    known = {word for file in code for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
    for page in PAGES:
        spans = SPAN.findall(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
        spans = [span for span in spans if re.fullmatch(r"[A-Za-z_][\w.]*", span) and not span.endswith(".md")]
        names = {name for span in spans for name in span.split(".")}
        names = {name for name in names if "_" in name.strip("_") or name != name.lower()}
        assert not names - known - NOT_IN_CODE, page.name


def test_pages_name_files_at_all():
    assert {"engine/optim/schedule.py", "engine/model/parameters.py"} <= named_files(ROOT / "ARCHITECTURE.md")


def test_the_workflow_runs_the_two_commands_of_the_readme():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Two commands")[2].partition("```sh\n")[2].partition("```")[0]
    commands = [line.partition("#")[0].strip() for line in section.splitlines()]
    assert job["strategy"]["matrix"]["command"] == commands == ["bash examples/quickstart.sh", "bash tests/run.sh"]
    assert {"3.10", "3.12"} <= set(job["strategy"]["matrix"]["python"])
    assert job["steps"][-1] == {"run": "${{ matrix.command }}"}


def test_the_workflow_of_wheels_is_consistent():
    """It has not run here: its scripts parse, what they name exists, and the wheel is the one that is tested."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["test"]["needs"] == "build"
    assert jobs["build"]["env"]["TRIAXIS_CUDA"] == "on"
    steps = [step for job in jobs.values() for step in job["steps"]]
    scripts = [step["run"] for step in steps if "run" in step]
    for script in scripts:
        plain = re.sub(r"\$\{\{.*?\}\}", "value", script)
        assert subprocess.run(["bash", "-n"], input=plain, text=True, capture_output=True).returncode == 0, script
    named = {word for script in scripts for word in re.findall(r"tests/\S+\.py", script)}
    assert named == {"tests/e2e/test_wheel.py"} and all((ROOT / name).exists() for name in named)
    cuda = jobs["build"]["strategy"]["matrix"]["cuda"]
    uploaded = {step["with"]["name"].replace("${{ matrix.cuda }}", one)
                for step in steps if "upload" in step.get("uses", "") for one in cuda}  # fmt: skip
    assert {step["with"]["name"] for step in steps if "download" in step.get("uses", "")} <= uploaded
    tested = jobs["test"]["strategy"]["matrix"]["include"]
    low, high = re.search(r"torch>=([\d.]+),<([\d.]+)", " ".join(project()["dependencies"])).groups()
    minor = [int(version.split(".")[1]) for version in (tested[0]["torch"], high)]
    assert tested[0]["torch"] == f"{low}.*" and int(tested[-1]["torch"].split(".")[1]) == minor[1] - 1
    assert tested[0]["python"] == project()["requires-python"].removeprefix(">=")


def test_pre_commit_runs_the_lint_and_nothing_else():
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in settings["repos"] for hook in repo["hooks"]]
    assert entries == ["bash tests/lint.sh"]


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {key: citation[key] for key in ("version", "license")}.items() <= project().items()


def test_every_extra_names_only_packages_that_code_imports():
    files = [
        path for folder in ("engine", "csrc", "tools", "tests", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files if path != Path(__file__))
    source += (ROOT / "tests/lint.sh").read_text(encoding="utf-8")
    for extra, requirements in project()["optional-dependencies"].items():
        for requirement in requirements:
            package = re.split(r"[\[<>=]", requirement)[0]
            module = IMPORTED_AS.get(package, package.replace("-", "_"))
            used = rf"(^|\s)(import|from) {module}\b|\"{module}\"|^{module}\b"
            used = PROGRAMS.get(package, used)
            assert re.search(used, source, re.M), f"extra {extra}: no code uses {package}"
