"""Convert a Hugging Face directory to a run directory, or a run or checkpoint to a Hugging Face directory.

The direction is inferred from the input. Memory use does not grow with the model or its tensors. With --verify, the
two are compared: tensors, and, where transformers is installed, logits (for which the model must fit in memory in
fp32), token ids and the ends of generated text.
"""

import argparse
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import orjson
import torch

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.exported_ids import difference_in_transformers, readers
from engine.checkpoint.huggingface.exporting import SHARD_BYTES, export
from engine.checkpoint.huggingface.files import TOKENIZER_FILES
from engine.checkpoint.huggingface.importing import import_directory
from engine.checkpoint.huggingface.verifying import as_json, verify
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.run_directory import BEST, open_checkpoint
from engine.checkpoint.storage import Storage
from engine.cli.arguments import command_name, program_parser
from engine.cli.progress import ProgressDisplay
from engine.data.tokenizers.files import CHAT_TEMPLATE
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError, ConfigError
from engine.formatting import counted
from engine.model.parameters import logical_shapes

EXAMPLES = """
examples:
  %(prog)s --from runs/llama2-7b --to llama2-7b-hf               # the newest checkpoint
  %(prog)s --from runs/llama2-7b-sft/best --to models/chat       # the checkpoint of the best evaluation
  %(prog)s --from models/Llama-2-7b-hf --to runs/imported        # a run directory with one checkpoint
  %(prog)s --from runs/llama2-7b --to llama2-7b-hf --verify      # and compare; only that if --to exists

Exit code 66: the conversion failed, or --verify found a difference.
"""
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TensorProgress(ProgressDisplay):
    """Progress of a conversion: tensors, speed, time left."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._num_tensors = len(shapes)
        self._num_elements = sum(map(math.prod, shapes.values()))
        self._tensors = self._elements = 0
        super().__init__(self._num_elements, interval_s=2.0)

    def __call__(self, name: str, elements: int) -> None:
        self._tensors += 1
        self._elements += elements
        self.update(self._elements, f"{self._tensors}/{self._num_tensors} tensors  {self._speed()}")

    def _speed(self) -> str:
        """Gigabytes of fp32 values per second."""
        return f"{self._elements * 4 / 1e9 / self.seconds:.2f} GB/s"

    def summary(self) -> str:
        done = f"{counted(self._tensors, 'tensor')}, {counted(self._num_elements, 'parameter')}"
        return f"{done} in {self.seconds:.1f} s ({self._speed()} of fp32 values)"


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = program_parser("convert", __doc__, EXAMPLES)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR", help="input directory")
    parser.add_argument("--to", dest="target", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument(
        "--dtype", choices=EXPORT_DTYPES, help="dtype of the exported weights (default bf16); imports keep fp32 masters"
    )
    parser.add_argument(
        "--shard-gb", type=float, metavar="GB", help="maximum size of a weight file of an export (default: 5)"
    )
    parser.add_argument("--without-tokenizer", action="store_true", help="export weights and configuration alone")
    parser.add_argument(
        "--verify", action="store_true",
        help="compare --from and --to after the conversion, or as they are if --to exists; the report is printed, "
        "and written to TO.verify.json",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = parser().parse_args(arguments)
    source, target = options.source, options.target
    best = source.name == BEST and source.parent.is_dir()
    if source.suffix == ".gguf":
        raise CheckpointError(f"--from {source} is {_GGUF}")
    if not source.is_dir() and not best:
        raise CheckpointError(f"no such directory: --from {source}")
    is_checkpoint = best or source.name == "checkpoints" or source.name.startswith("step_")
    exports = is_checkpoint or (source / "manifest.json").exists() or (source / "checkpoints").exists()
    if not exports and not (source / "config.json").exists():
        raise CheckpointError(f"--from {source} is {_not_convertible(source)}")
    if exports:
        source = open_checkpoint(source).path  # the newest one now, even if the run goes on
    if not (options.verify and target.is_dir() and any(target.iterdir())):
        with _one_thread():
            _convert(source, options, exports)
    if options.verify:
        run, huggingface = (source, target) if exports else (target, source)
        verify_conversion(open_checkpoint(run), huggingface, target.with_name(f"{target.name}.verify.json"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread of PyTorch: blocks are small, and threads that wait for each other take the writer's core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_GGUF = (
    "a GGUF file, as llama.cpp writes it, which is not read. Use the model it was made from, or convert it: "
    "AutoModelForCausalLM.from_pretrained(DIR, gguf_file=NAME).save_pretrained(NEW) in transformers"
)


def _not_convertible(source: Path) -> str:
    if any(source.glob("*.distcp")) or any(source.glob("*/*.distcp")):
        return (
            "a checkpoint of torch.distributed, as Megatron-Core writes it; its index is a pickle, which may run code "
            "when it is opened, and is not read. Megatron-Bridge (AutoBridge.export_ckpt) makes a Hugging Face "
            "directory of it; convert that"
        )
    if any(source.glob("*.gguf")):
        return f"a directory of {_GGUF.removeprefix('a ')}"
    if (source / "adapter_config.json").exists():
        return (
            "an adapter of peft, not a model; merge it into its base and convert the result: "
            "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)"
        )
    if snapshots := sorted(map(str, source.glob("snapshots/*"))):
        return f"a repository in the cache of the Hub; name a snapshot: {', '.join(snapshots)}"
    return (
        "neither a Hugging Face directory (config.json), nor a run directory (checkpoints/), nor a checkpoint "
        "(manifest.json)"
    )


def _convert(source: Path, options: argparse.Namespace, exports: bool) -> None:
    if exports:
        export_checkpoint(
            source,
            options.target,
            EXPORT_DTYPES[options.dtype or "bf16"],
            with_tokenizer=not options.without_tokenizer,
            shard_bytes=_shard_bytes(options.shard_gb),
        )
        return
    if options.dtype:
        raise ConfigError(
            f"--dtype {options.dtype} applies only to exports; an import always keeps fp32 master weights"
        )
    if options.without_tokenizer or options.shard_gb is not None:
        raise ConfigError("--without-tokenizer and --shard-gb apply only to exports")
    import_model(source, options.target)


def import_model(source: Path, target: Path) -> None:
    """Import the Hugging Face directory `source` as a run directory with one checkpoint."""
    directory = HuggingFaceDirectory(source)
    shapes = logical_shapes(directory.model)
    directory.require(shapes)
    for name in directory.ignored:
        print(f"not used: {name}")
    has_tokenizer = _reads_tokenizer(directory)
    with closing(TensorProgress(shapes)) as progress:
        checkpoint = import_directory(directory, target, shapes, progress)
    print(f"imported {progress.summary()}")
    print(f"from {source} ({directory.model.family}) into {checkpoint}")
    if has_tokenizer:
        print(f"generate:  {command_name('generate')} {shlex.quote(str(target))} --prompt 'Once upon a time'")
    print(f"train on:  set run.resume to {target} in a configuration with the model section of")
    print(f"           {checkpoint / 'config.yaml'}")


def _reads_tokenizer(directory: HuggingFaceDirectory) -> bool:
    """Say which tokenizer is imported, or why text generation will find none."""
    try:
        tokenizer = load_tokenizer(directory.path, fast=False)
    except ConfigError as error:
        print(f"without a tokenizer, which text generation needs: {error}")
        return False
    model = tokenizer.files[0]
    if model.name not in TOKENIZER_FILES:
        print(f"without a tokenizer, which text generation needs: {model} is imported if it is named tokenizer.model")
        return False
    print(f"tokenizer: {model.name}, {counted(tokenizer.vocab_size, 'token')}")
    if tokenizer.note:
        print(f"tokenizer: {tokenizer.note}")
    if tokenizer.vocab_size > directory.model.vocab_size:
        rows = directory.model.vocab_size
        print(
            f"warning: the tokenizer has {tokenizer.vocab_size} entries, the embedding {rows} rows; training needs a "
            "row for each"
        )
    if difference := difference_in_transformers(directory.path, tokenizer):
        print(f"warning: {difference}; training uses the latter, and so does transformers with an export")
    return True


def _shard_bytes(gigabytes: float | None) -> int:
    if gigabytes is None:
        return SHARD_BYTES
    if not gigabytes > 0:
        raise ConfigError(f"--shard-gb {gigabytes}; expected a positive number of gigabytes")
    return math.ceil(gigabytes * 1000**3)


def export_checkpoint(
    source: Path,
    target: Path,
    dtype: torch.dtype,
    *,
    with_tokenizer: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Export the newest checkpoint of a run, or the checkpoint `source`, as a Hugging Face directory."""
    checkpoint = open_checkpoint(source)
    model = checkpoint.model
    shapes = logical_shapes(model)
    tokenizer = _tokenizer(checkpoint, with_tokenizer)
    with closing(TensorProgress(shapes)) as progress:
        export(
            checkpoint, tokenizer, target, shapes,
            dtype=dtype, shard_bytes=shard_bytes, with_tokenizer=with_tokenizer, progress=progress,
        )  # fmt: skip
    print(f"exported {progress.summary()}, read back and verified")
    if tokenizer is not None and with_tokenizer:
        print(f"token ids of probe texts, read by {' and '.join(readers())}, are those of the run")
    state, kind = checkpoint.state, str(dtype).removeprefix("torch.")
    print(f"from {checkpoint.path} (step {state.step}) into {target} as {model.family}, {kind}")
    if state.best is not None and state.best.step != state.step:
        best = shlex.quote(str(checkpoint.path.parent / BEST))
        print(f"the best evaluation was at step {state.best.step}: --from {best}")
    if tokenizer is None or not with_tokenizer:
        return
    if (target / CHAT_TEMPLATE).exists():
        print(f"chat:      {command_name('chat')} {shlex.quote(str(target))}")
    else:
        print(f"generate:  {command_name('generate')} {shlex.quote(str(target))} --prompt 'Once upon a time'")


def _tokenizer(checkpoint: Checkpoint, with_files: bool) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint and say what is exported of it.

    Raises:
        ConfigError: it cannot be loaded, and its files are to be exported.
    """
    spec = checkpoint.tokenizer_spec
    if spec is None:
        print(f"{checkpoint.path} holds no tokenizer: none is exported")
        return None
    try:
        tokenizer = load_tokenizer(spec, fast=False)
    except ConfigError as error:
        if with_files:
            raise
        print(f"no tokenizer is exported, and no ids of special tokens: {error}")
        return None
    if not with_files:
        print("no tokenizer is exported, only the ids of its special tokens")
    elif tokenizer.note:
        print(f"tokenizer: {tokenizer.note}")
    return tokenizer


def verify_conversion(checkpoint: Checkpoint, huggingface: Path, report: Path) -> None:
    """Compare a checkpoint with a Hugging Face directory; print the result and write it to the JSON file `report`.

    Raises:
        CheckpointError: they differ.
    """
    shapes = logical_shapes(checkpoint.model)
    with closing(TensorProgress(shapes)) as progress:
        checks = verify(checkpoint, huggingface, shapes, progress)
    for check in checks:
        print(f"verify     {check.name:<11} {check.result}: {check.detail}")
    content = orjson.dumps(
        as_json(checkpoint, huggingface, checks), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    )
    Storage().replace_text(report, content.decode())
    if different := [check.name for check in checks if check.result == "different"]:
        error = CheckpointError(f"{huggingface} differs from {checkpoint.path} in {', '.join(different)}; see {report}")
        error.advice = "the conversion is complete; decide by the report whether the difference matters to you"
        raise error
    print(f"verified: {report}")
