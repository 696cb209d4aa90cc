"""The comparison of cuBLASLt's algorithms, on the host: with plans and times that are made up."""

import pytest

from engine.errors import ConfigError
from engine.ops import fp8
from engine.ops.fp8_algorithms import Plan
from tools.bench import fp8_algorithms
from tools.bench.fp8_algorithms import main
from tools.bench.results import load

SCALINGS = ("tensorwise", "block_1x128", "block_128x128")


class Plans:
    """Plans with three candidates, of which the second is the fastest, by little, and the third is chosen."""

    version = 130400
    made: list[Plan] = []  # noqa: RUF012 (of the process, as those of csrc)

    def existing(self):
        return list(self.made)

    def candidates(self, plan):
        return [b"first", b"second", b"third"]

    def measure(self, plan):
        return b"third"

    def timer(self, plan):
        return {b"first": 8e-6, b"second": 5e-6, b"third": 6e-6}.__getitem__


def noted(function, out_dtype):
    def call(*given, impl, fast=False, **other):
        a, b = given[-2:] if out_dtype == 0 else given[:2]
        scalings = SCALINGS.index(a.scaling), SCALINGS.index(b.scaling)
        plan = Plan(0, a.values.shape[0], b.values.shape[0], a.values.shape[1], 3, 3, out_dtype, *scalings, int(fast))
        if plan not in Plans.made:
            Plans.made.append(plan)
        assert impl == "cublaslt"
        return function(*given, fast=fast) if out_dtype else function(*given)

    return call


def test_each_matmul_is_compared_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Plans, "made", [])
    small = {"DEVICE": "cpu", "TOKENS": 32, "LAYERS": ((64, 192), (64, 64), (64, 192)), "ROUNDS": 2, "Fp8Plans": Plans}
    small |= {
        "require_kernels": lambda: None,
        "_scales_blocks": lambda: True,
        "source": lambda commit: {"gpu": "a GPU"},
    }
    small |= {"scaled_matmul": noted(fp8.scaled_matmul, 1), "add_scaled_matmul": noted(fp8.add_scaled_matmul, 0)}
    for name, value in small.items():
        monkeypatch.setattr(fp8_algorithms, name, value)
    main(["--json", str(tmp_path / "new" / "algorithms.json")])
    printed = capsys.readouterr().out
    assert printed.startswith("a GPU, cuBLASLt 130400, 32 tokens\n")
    assert printed.endswith("all together: fastest 0.62× and chosen 0.75× the first\n")
    document = load(tmp_path / "new" / "algorithms.json")
    assert document["machine"] == {"gpu": "a GPU", "cublaslt": 130400}
    assert list(document["rows"])[:4] == [
        "FP8 algorithms, tensorwise, forward, 32×192×64",
        "FP8 algorithms, tensorwise, input gradient, 32×64×192",
        "FP8 algorithms, tensorwise, weight gradient, 192×64×32",
        "FP8 algorithms, blockwise, forward, 32×192×64",
    ]
    rows = document["rows"].values()
    assert len(rows) == 11  # the third layer has the shapes of the first, and a square layer in blocks one shape twice
    assert all((row["first_us"], row["fastest_us"], row["value"]) == pytest.approx((8, 5, 6)) for row in rows)


def test_it_needs_a_gpu():
    with pytest.raises(ConfigError, match="finds none"):
        main([])
