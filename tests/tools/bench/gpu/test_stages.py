"""The stages of a run on a GPU: complete, in order, within their limit."""

import re
from pathlib import Path

from tools.bench import kernels, ranks, whole_step
from tools.bench.gpu.environment import NEEDS
from tools.bench.gpu.stages import LIMIT_S, ROOT, Scale, stages, step_row, whole_steps
from tools.bench.kernel_table import key, rows

ALL = stages(Scale())
NAMES = [stage.name for stage in ALL]


def test_stages_are_distinct_short_and_of_known_needs():
    assert len(set(NAMES)) == len(NAMES)
    for stage in ALL:
        assert stage.estimate_s <= LIMIT_S, stage.name
        assert set(stage.needs) <= set(NEEDS), stage.name
        assert (ROOT / stage.command[0]).is_file(), stage.name
    minutes = sum(stage.estimate_s for stage in ALL) / 60
    assert minutes < 60
    for page in ("tools/bench/README.md", "CONTRIBUTING.md"):
        assert f" {minutes:.0f} minutes predicted" in (ROOT / page).read_text(encoding="utf-8")


def test_what_is_right_comes_before_what_is_fast():
    first_step = next(number for number, name in enumerate(NAMES) if name.startswith("step-"))
    assert NAMES[:2] == ["accumulate", "tests-fp8-sm90"]
    assert all(name.startswith("tests-") for name in NAMES[1 : first_step - 1])
    assert NAMES[first_step : first_step + 3] == ["step-delayed", "step-tensorwise", "step-bf16"]


def test_every_row_of_the_table_of_kernels_is_measured_once():
    measured = []
    for stage in ALL:
        if stage.name.startswith("kernels-"):
            chosen = stage.command[stage.command.index("--only") + 1 :]
            assert [key(row) for row in kernels.choose(chosen)] == sorted(chosen, key=[key(r) for r in rows()].index)
            measured += chosen
    assert sorted(measured) == sorted(key(row) for row in rows())


def test_every_file_of_gpu_tests_is_run():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert {word for stage in ALL for word in stage.command if word.startswith("tests/gpu")} == files
    parts = [word for stage in ALL if stage.name.startswith("tests-ranks") for word in stage.command if "/" in word]
    assert [part for part in parts if re.fullmatch(r"\d/\d", part)] == ["1/4", "2/4", "3/4", "4/4"]


def test_whole_steps_have_settings_that_a_run_accepts():
    for step in whole_steps():
        options = whole_step._arguments(["--device", "cpu", "--name", step_row(step, "llama2-7b"), *step.arguments])
        config = whole_step.configure(options)
        assert config.batch.global_ * config.data.seq_length == 65_536
        assert config.precision.mode == ("bf16" if step.precision == "bf16" else "fp8")
        assert step.precision in ("bf16", config.precision.recipe)
        assert config.data.document_mask == ("documents" in step.name)
        assert config.batch.micro == (2 if "two" in step.name else 1)
        in_bf16 = config.precision.mode == "fp8" or step.name == "bf16, two"
        assert config.optimizer.moments == ("bf16" if in_bf16 else "fp32")


def test_ranks_use_nccl_where_one_is_given():
    ranks = [stage for stage in stages(Scale(), Path("/b/libnccl.so.2")) if "ranks" in stage.name]
    assert {stage.environment["LD_PRELOAD"] for stage in ranks} == {"/b/libnccl.so.2"}
    assert all("nccl" in " ".join(stage.command) for stage in ranks)
    assert all("LD_PRELOAD" not in stage.environment for stage in ALL)


def test_hidden_communication_needs_nccl_and_leaves_no_traces(tmp_path):
    (stage,) = (stage for stage in stages(Scale(), Path("/b/libnccl.so.2")) if stage.name == "ranks-overlap")
    assert "nccl" in stage.needs
    options = ranks._parse([*stage.command[1:], "--json", "x.json"])
    assert (options.traces, options.backend, options.only) == (True, "nccl", ["dp 2", "tp 2", "pp 2"])
    options.directory = tmp_path
    config = ranks._config(options, ranks.RUNS["tp 2"])
    assert (config.model.hidden_size, config.precision.mode) == (4096, "bf16")


def test_a_rehearsal_needs_no_gpu_where_a_cpu_can_run_the_program():
    needs = {stage.name: set(stage.needs) for stage in stages(Scale("cpu", "tiny"))}
    assert all("gpu" not in needs[name] for name in needs if name.startswith(("step-", "host-", "ranks")))
    assert not needs["sustained"] | needs["attention"]
    assert needs["step-transformers-liger"] == {"transformers", "liger"}
    assert all("gpu" in needs[name] for name in needs if name.startswith(("tests-", "kernels-", "accumulate")))
