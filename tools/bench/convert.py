"""Compare importing and exporting a Hugging Face directory with copying files: seconds, CPU seconds, peak memory.

    python tools/bench/convert.py [--preset llama3.2-1b] [--rounds 5] [--cold] [--json runs/convert.json]

The copy (`cp -r`, then `sync` of the new files, because a conversion syncs its own) writes the same files as the
conversion, to the same disk; it reads as much as it writes, an import half of that, an export twice as much. All are
programs of their own, interleaved, in alternating order. The speed is that of the whole program, and without its
start-up, the time of `convert --help`, which does not grow with the model. Memory is the maximum resident set, with
PyTorch's libraries. `--cold` drops the pages of the input from the page cache first. Needs disk space for 16 bytes per
parameter.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from engine.checkpoint.huggingface.config import hf_config
from engine.checkpoint.huggingface.files import CONFIG, SINGLE, write_json
from engine.checkpoint.rectangles import Shape, row_blocks
from engine.checkpoint.storage import CHUNK_BYTES, Entry, Storage
from engine.config.schema import ModelConfig
from engine.errors import run_program
from engine.formatting import counted
from engine.model.families import PRESETS
from engine.model.parameters import logical_shapes
from engine.ops.measured import processor_name

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.results import Results

MODEL = "llama3.2-1b"
MODELS = PRESETS | {
    MODEL: PRESETS["llama3.1-8b"]
    | {"num_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "tie_embeddings": True}
}
CONVERT = (sys.executable, "-m", "engine", "convert")
COPY = ("sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +')
PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
Measured = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=MODELS, default="llama3.2-1b", metavar="NAME", help="(default: llama3.2-1b)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure (default: temporary files')")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    options = parser.parse_args(arguments)
    model = ModelConfig(**MODELS[options.preset])
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "load": os.getloadavg()}
    results = Results(options.json, machine)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, row in compare(Path(folder), model, options.rounds, options.cold):
            results.add(name, row)


def compare(folder: Path, model: ModelConfig, rounds: int, cold: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """Print and yield a row for each conversion and each copy."""
    source, run, exported, out = (folder / name for name in ("source", "run", "exported", "out"))
    shapes = logical_shapes(model)
    write_model(source, model, shapes)
    measure((*CONVERT, "--from", str(source), "--to", str(run)), source, cold=False)
    measure((*CONVERT, "--from", str(run), "--to", str(exported)), run, cold=False)
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    print(f"{counted(elements, 'parameter')}; {rounds} rounds, {'cold' if cold else 'warm'} page cache")
    heads = f"{'':<8}{'read':>9}{'written':>9}{'seconds':>11}{'CPU':>9}{'memory':>9}"
    print(f"{heads}   of the copy's speed   without start-up", flush=True)
    for name, read, wrote in (("import", source, run), ("export", run, exported)):
        programs = {
            "start": (*CONVERT, "--help"),
            "copy": (*COPY, str(wrote), str(out)),
            name: (*CONVERT, "--from", str(read), "--to", str(out)),
        }
        rows: dict[str, list[Measured]] = {program: [] for program in programs}
        for number in range(rounds):
            for program in sorted(programs, reverse=bool(number % 2)):
                rows[program].append(measure(programs[program], wrote if program == "copy" else read, cold))
                shutil.rmtree(out, ignore_errors=True)
        for program in programs:
            row = {key: statistics.median(each[key] for each in rows[program]) for key in rows[program][0]}
            moved = [size(wrote if program == "copy" else read), size(wrote)] if program != "start" else [0, 0]
            line = f"{program:<8}{moved[0] / 1e9:>6.2f} GB{moved[1] / 1e9:>6.2f} GB{row['seconds']:>9.1f} s"
            line += f"{row['cpu_seconds']:>7.1f} s" + f"{row['peak_bytes'] / 1e6:>6.0f} MB" * (program != "copy")
            print(line + (speeds(rows, name) if program == name else ""), flush=True)
            yield f"{name}/{program}", row | {"rounds": rows[program], "read": moved[0], "written": moved[1]}


def speeds(rows: dict[str, list[Measured]], name: str) -> str:
    """Format the speed of a conversion as a part of the copy's in the same round: median, lowest, highest."""
    columns = []
    for start in (0.0, statistics.median(each["seconds"] for each in rows["start"])):
        rounds = zip(rows["copy"], rows[name], strict=True)
        ratios = sorted(copy["seconds"] / (ours["seconds"] - start) for copy, ours in rounds)
        columns.append(f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return f"   {columns[0]:<22}{columns[1]}"


def write_model(path: Path, model: ModelConfig, shapes: dict[str, Shape]) -> None:
    """Write a Hugging Face directory of random bf16 weights."""
    path.mkdir()
    generator = torch.Generator().manual_seed(0)

    def blocks(shape: Shape) -> Iterator[torch.Tensor]:
        for block in row_blocks(shape, CHUNK_BYTES):
            yield torch.randn(block.extent, generator=generator).bfloat16()

    entries = [Entry(name, shape, torch.bfloat16, partial(blocks, shape)) for name, shape in shapes.items()]
    files = Storage()
    files.write_safetensors(path / SINGLE, entries, {"format": "pt"})
    write_json(files, path / CONFIG, hf_config(model, dtype=torch.bfloat16, bos_id=None, eos_id=None, pad_id=None))


def measure(command: Sequence[str], read: Path, cold: bool) -> Measured:
    """Run a program that reads the directory `read`: wall and CPU seconds, peak resident memory in bytes.

    Raises:
        CalledProcessError: it failed.
    """
    for file in filter(Path.is_file, read.rglob("*")):
        with open(file, "rb") as content:
            if cold:
                os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while content.read(CHUNK_BYTES):
                    pass
    start, peak_kb, pid = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not pid:  # the kernel's own maximum in `usage` includes this program's memory at the fork
        if found := PEAK.search(Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")):
            peak_kb = max(peak_kb, int(found[1]))
        time.sleep(0.01)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": peak_kb * 1024}


def size(path: Path) -> int:
    """Return the bytes of the files under a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


if __name__ == "__main__":
    run_program(main)
