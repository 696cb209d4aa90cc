"""The emulated TMA stops at what a GPU refuses, and at what goes wrong on one only sometimes."""

import ctypes
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import pytest
import torch

from csrc.build import run

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Box:
    """A copy within the rules: a box of bytes, swizzled."""

    bytes: int = 1
    rows: int = 64
    columns: int = 256
    box_rows: int = 8
    box_columns: int = 128
    row: int = 3
    column: int = 16
    to: int = 0
    barrier: int = 0


FLOATS = Box(4, 8, 64, 1, 4, 3, 4, 128)  # not swizzled

BROKEN = [
    (replace(FLOATS, column=5), "from column 5, 20 bytes into a row: not a multiple of 16 bytes"),
    (replace(FLOATS, column=-2), "from column -2, -8 bytes into a row: not a multiple of 16 bytes"),
    (replace(Box(), column=8), "from column 8, 8 bytes into a row: not a multiple of 16 bytes"),
    (replace(FLOATS, to=64), "to address 1088 of shared memory: not a multiple of 128"),
    (replace(Box(), to=128), "to address 1152 of shared memory: not a multiple of 1024"),
    (replace(FLOATS, to=8192), "beyond the end of shared memory"),
    (replace(FLOATS, barrier=4), "a barrier at an address that is not a multiple of 8"),
    (replace(FLOATS, columns=66), "rows must be multiples of 16 bytes"),
    (replace(FLOATS, rows=0), "1 to 2^32 elements"),
    (replace(FLOATS, box_columns=260), "boxes of 1 × 260: a box has 1 to 256 elements"),
    (replace(Box(), rows=600, box_rows=257), "boxes of 257 × 128: a box has 1 to 256 elements"),
    (replace(FLOATS, box_rows=0), "a box has 1 to 256 elements"),
    (replace(FLOATS, box_columns=1), "a row of a box must be a multiple of 16 bytes"),
    (replace(Box(), box_columns=144), "a row of a swizzled box has at most 128 bytes"),
]
FAULTS = {
    "no fence": "fence_reads() is missing",
    "fence before the read": "fence_reads() is missing",
    "one lane fences": "fence_reads() is missing",
    "no syncwarp": "__syncwarp() is missing",
}


@pytest.fixture(scope="module")
def rules(toolchain, tmp_path_factory):
    """The C functions of tma_rules.cpp."""
    library = tmp_path_factory.mktemp("rules") / "rules.so"
    sources = ["-x", "c++", str(HERE / "tma_rules.cpp"), str(HERE.parents[1] / "csrc" / "emulation" / "cuda.cpp")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", f"-isystem{toolchain.cuda}/include"]
    run([toolchain.cxx, *flags, *sources, "-o", str(library)])
    functions = ctypes.CDLL(str(library))
    functions.copy_of_box.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 9]
    functions.ring_of_one.argtypes = [ctypes.c_void_p, ctypes.c_int]
    for function in (functions.copy_of_box, functions.ring_of_one):
        function.restype = ctypes.c_char_p
    return functions


def copied(rules, box: Box, offset: int = 0) -> str:
    data = torch.zeros(2**18, dtype=torch.uint8)
    return rules.copy_of_box(data.data_ptr() + offset, *astuple(box)).decode()


@pytest.mark.parametrize("box", [Box(), replace(Box(), row=-3, column=-16), FLOATS, replace(FLOATS, column=60)])
def test_within_the_rules(rules, box):
    """Also where a box lies partly outside of the matrix."""
    assert copied(rules, box) == ""


@pytest.mark.parametrize("box, message", BROKEN)
def test_a_rule_that_is_broken_is_named(rules, box, message):
    assert message in copied(rules, box)
    assert copied(rules, Box()) == ""  # the emulation works after an error


def test_a_matrix_that_is_not_aligned(rules):
    assert "must start at a multiple of 16 bytes" in copied(rules, FLOATS, offset=8)


def test_memory_is_given_back_after_a_fence_of_every_thread(rules):
    data = torch.zeros(16)
    assert rules.ring_of_one(data.data_ptr(), 0) == b""
    for number, (fault, message) in enumerate(FAULTS.items(), start=1):
        assert message in rules.ring_of_one(data.data_ptr(), number).decode(), fault
