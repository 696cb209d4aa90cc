"""Compare our encoder with plain SentencePiece: megabytes of text per second and core; ids must be equal.

Both encode the same documents in one process, alternating between slices of the corpus. In the first pass every
document is new, as in a real corpus; the second pass shows the effect of cached words. Times are CPU times of the
process, so that other programs and additional threads do not count.
"""

import argparse
import importlib.util
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from engine.data.tokenizers.sentencepiece import SentencePieceTokenizer
from engine.errors import ConfigError, DataError, run_program
from engine.testing.tokenizers import NASTY_TEXTS, standard_library_texts, train_sentencepiece

TARGET = 5.0  # speedup over SentencePiece in the first pass
SLICES = 15
QUICK_BYTES = 1_500_000
MODEL = "tokenizer.model.v1"  # of mistral-common: 32,000 pieces
TOOL = Path(__file__).parents[1] / "preprocess_data.py"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer-model", type=Path, metavar="PATH", help=f"default: {MODEL} of mistral-common")
    parser.add_argument(
        "--quick", action="store_true", help="use a small corpus; train a model if mistral-common is not installed"
    )
    options = parser.parse_args(arguments)
    texts = [*standard_library_texts(QUICK_BYTES if options.quick else None), *NASTY_TEXTS]
    random.Random(0).shuffle(texts)
    with tempfile.TemporaryDirectory() as folder:
        model = options.tokenizer_model or _mistral_model() or _trained_model(Path(folder), texts, options.quick)
        _describe(model, texts)
        _compare(model, texts)
        if options.quick:
            print("skipped with --quick: the whole program, as its startup would take most of the time")
        else:
            _whole_tool(Path(folder), model, texts)


def _describe(model: Path, texts: Sequence[str]) -> None:
    print(f"machine    {_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"versions   {', '.join(f'{name} {_version(name)}' for name in ('sentencepiece', 'gigatoken'))}")
    print(f"corpus     Python's standard library: {len(texts):,} texts, {_num_bytes(texts) / 1e6:.1f} MB")
    print(f"model      {model.name}: {SentencePieceTokenizer(model, fast=False).vocab_size:,} pieces\n")


def _compare(model: Path, texts: Sequence[str]) -> None:
    """Print one line per pass.

    Raises:
        DataError: the ids of a document differ.
    """
    plain, ours = (SentencePieceTokenizer(model, fast=fast) for fast in (False, True))
    print(f"ours       {ours.encoder}\n")
    print(f"{'MB/s per core':<22}{'sentencepiece':>14}{'ours':>10}{'ratio':>9}")
    for name in ("first pass", "second pass"):
        speeds = [_turn(plain, ours, texts[start::SLICES]) for start in range(min(SLICES, len(texts)))]
        slow, fast = (statistics.median(column) for column in zip(*speeds, strict=True))
        ratio = statistics.median(ours / plain for plain, ours in speeds)
        print(f"{name:<22}{slow:>14.2f}{fast:>10.2f}{ratio:>8.1f}×", flush=True)
        if name == "first pass":
            verdict = f"target {TARGET}× {'reached' if ratio >= TARGET else 'MISSED'}"
    print(f"\nids identical on all {len(texts):,} documents, in both passes; {verdict}\n")


def _turn(plain: SentencePieceTokenizer, ours: SentencePieceTokenizer, texts: Sequence[str]) -> tuple[float, float]:
    """Both speeds on some documents, in MB/s."""
    expected, slow = _timed(lambda: [plain.encode(text) for text in texts])
    ids, fast = _timed(lambda: ours.encode_batch(texts))
    for text, a, b in zip(texts, ids, expected, strict=True):
        if a.tolist() != b:
            raise DataError(f"ids differ from SentencePiece's on a document that starts {text[:80]!r}")
    megabytes = _num_bytes(texts) / 1e6
    return megabytes / slow, megabytes / fast


def _whole_tool(folder: Path, model: Path, texts: Sequence[str]) -> None:
    """The program on a `.jsonl` file, with start-up and writing; wall time."""
    corpus = folder / "corpus.jsonl"
    corpus.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    print(f"{'tools/preprocess_data.py':<38}{'MB/s':>6}{'seconds':>10}{'CPU seconds':>14}   with start-up")
    for encoder, workers in (("sentencepiece", 1), ("auto", 1), ("auto", 2)):
        flags = ["--input", corpus, "--output-prefix", folder / "out", "--tokenizer-model", model, "--append-eod"]
        flags += ["--overwrite", "--encoder", encoder, "--workers", workers]
        start, start_cpu = time.perf_counter(), _children_cpu_seconds()
        subprocess.run([sys.executable, TOOL, *map(str, flags)], check=True, stdout=subprocess.DEVNULL)
        seconds, cpu_seconds = time.perf_counter() - start, _children_cpu_seconds() - start_cpu
        speed = _num_bytes(texts) / 1e6 / seconds
        label = f"--encoder {encoder} --workers {workers}"
        print(f"{label:<38}{speed:>6.1f}{seconds:>10.1f}{cpu_seconds:>14.1f}", flush=True)


def _mistral_model() -> Path | None:
    """The file in the package, which is not imported: its many dependencies are not needed."""
    package = importlib.util.find_spec("mistral_common")
    folders = package.submodule_search_locations if package else None
    return Path(folders[0]) / "data" / MODEL if folders else None


def _trained_model(folder: Path, texts: Sequence[str], quick: bool) -> Path:
    if not quick:
        raise ConfigError(
            "mistral-common, which holds the model, is not installed: pip install --no-deps mistral-common; "
            "or name another with --tokenizer-model"
        )
    path = folder / "trained.model"
    path.write_bytes(train_sentencepiece(texts[:300], vocab_size=2000))
    return path


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def _children_cpu_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _num_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    run_program(main)
