"""What the compiler made of the kernels: registers, spills, instructions and divisions.

    python -m csrc.report build/csrc/norm-*.o            # one line for each kernel in the object

Registers and spills are in the .txt that `compile_objects` writes next to an object; instructions come from CUDA's
`cuobjdump`. Counts of instructions are what can be known of a kernel's speed without a GPU; they are not its speed.
"""

import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csrc.build import find_nvcc, run

_ARCH = "sm_90a"
_BACK = re.compile(r"\bBRA\S*(?: \S+,)? (0x[0-9a-f]+)")  # "@!P0 BRA 0x7a0": the address is that of the target


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address in the kernel and its text."""

    address: int
    text: str


@dataclass(frozen=True)
class Kernel:
    """What the compiler reports of one kernel for Hopper.

    Attributes:
        name: mangled.
        spilled: bytes that a thread stores for want of registers.
        code: instructions in the order of their addresses; empty if not disassembled.
    """

    name: str
    registers: int
    spilled: int
    code: tuple[Instruction, ...] = ()

    @property
    def loop(self) -> tuple[Instruction, ...]:
        """The longest loop: from the target of a jump back to the jump. Parts that the compiler moved out are missing:
        the rare cases of a division, and of a shuffle by a part of a warp.
        """
        jumps = [(int(match[1], 16), i.address) for i in self.code if (match := _BACK.search(i.text))]
        start, end = max(((to, at) for to, at in jumps if to < at), key=lambda jump: jump[1] - jump[0], default=(1, 0))
        return tuple(i for i in self.code if start <= i.address <= end)


def divisions(code: Sequence[Instruction]) -> int:
    """Divisions, of floats or of integers: each starts with a reciprocal."""
    return sum("MUFU.RCP" in i.text for i in code)


def find_cuobjdump() -> Path | None:
    """Find CUDA's disassembler: next to nvcc, on PATH, or in the package nvidia-cuda-cuobjdump; None if there is none.

    It needs nvdisasm, from the same place.
    """
    nvcc, on_path = find_nvcc(), shutil.which("cuobjdump")
    candidates = [nvcc.parent / "cuobjdump"] if nvcc else []
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "cuobjdump"]
    return next((path for path in candidates if path.is_file()), None)


def read_report(text: str) -> dict[str, Kernel]:
    """Kernels by name, from the report of ptxas."""
    pattern = (
        rf"Compiling entry function '(\S+)' for '{_ARCH}'\n.*\n"
        r".*?(\d+) bytes spill stores.*\n.*Used (\d+) registers"
    )
    return {name: Kernel(name, int(registers), int(spilled)) for name, spilled, registers in re.findall(pattern, text)}


def read_kernels(target: Path, cuobjdump: Path | None) -> dict[str, Kernel]:
    """Kernels of an object by name, with their code if there is `cuobjdump`. Raises: BuildError: it failed."""
    kernels = read_report(target.with_suffix(".txt").read_text(encoding="utf-8"))
    if cuobjdump is None:
        return kernels
    code = read_code(run([str(cuobjdump), "-sass", "-arch", _ARCH, str(target)]))
    return {name: Kernel(name, k.registers, k.spilled, code[name]) for name, k in kernels.items()}


def read_code(text: str) -> dict[str, tuple[Instruction, ...]]:
    """Instructions by kernel, from the output of `cuobjdump -sass`."""
    functions = (part.split("\n", 1) for part in text.split("Function : ")[1:])
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ?;")
    return {
        name.strip(): tuple(Instruction(int(address, 16), code) for address, code in line.findall(body))
        for name, body in functions
    }


def _line(kernel: Kernel) -> str:
    filter_names = shutil.which("c++filt")
    name = run([filter_names, kernel.name]).strip() if filter_names else kernel.name
    counts = f"{kernel.registers:4} registers, {kernel.spilled:4} bytes spilled"
    if kernel.code:
        loop = kernel.loop
        counts += f", {len(kernel.code):5} instructions, {divisions(kernel.code):2} divisions"
        counts += f"; longest loop {len(loop):4}, {divisions(loop):2}"
    for noise in (r"triaxis::\(anonymous namespace\)::", r"^void ", r"\(\w+\)(?=\d)", r"\(triaxis_\w+_args.*"):
        name = re.sub(noise, "", name)
    return f"{counts}: {name}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        for found in read_kernels(path, find_cuobjdump()).values():
            print(_line(found))
