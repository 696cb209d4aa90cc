"""Hugging Face directories: reading them with distrust, importing, exporting.

A checkpoint already speaks Hugging Face's names and shapes, so both ways are a copy, tensor by tensor, and a
`config.json`. What is written is read back before it gets its name; what is read is never a pickle and never code.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from engine.checkpoint.huggingface import tokenizer_files as hf_tokenizer
from engine.checkpoint.huggingface.config import hf_config, model_config_from_hf
from engine.checkpoint.manager import Checkpoint, Piece, State, save
from engine.checkpoint.rectangles import Rectangle, Shape, differences
from engine.checkpoint.storage import Entry, SafetensorsFile, Storage, Written, read_file, require_file, tensor_hash
from engine.config.schema import SOURCES, ModelConfig
from engine.data.chat.template import ChatEncoder, find_template
from engine.data.tokenizers.tokenizer import Tokenizer
from engine.errors import CheckpointError, ConfigError, StorageError

SHARD_BYTES = 5 * 1000**3
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", GENERATION_CONFIG,
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_JSON_BYTES = 256 << 20
_FLOATS = ("F64", "F32", "BF16", "F16")

Progress = Callable[[str, int], None]
"""Told the name and the number of elements of every tensor when it is written."""


class HuggingFaceDirectory:
    """A Hugging Face model directory, opened; nothing in it is believed, executed or unpickled.

    Attributes:
        model: the architecture that config.json describes.
        ignored: files that look like weights and are not read, and tensors that carry nothing.

    Raises:
        CheckpointError: with the file and the reason why it is refused.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"no such model directory: {self.path} (nothing is downloaded; `hf download` does that)"
            )
        names = sorted(entry.name for entry in self.path.iterdir())
        if code := [name for name in names if name.endswith(".py")]:
            raise CheckpointError(f"{self.path / code[0]}: a directory that brings its own code is refused")
        self.config = self._json(CONFIG)
        self.ignored = [name for name in names if name.endswith(_PICKLES)]
        self._files = self._open_weights()
        self.model = self._model_config()
        has_tokenizer = not {"tokenizer.model", "tokenizer.json"}.isdisjoint(names)
        self.tokenizer_files = [self._inside(name) for name in names if name in TOKENIZER_FILES and has_tokenizer]

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes of the parameters."""
        return {name: file.shape(name) for name, file in self._files.items()}

    def read(self, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """A rectangle (default: all) of a tensor, in the dtype of the file; only its rows are read."""
        return self._files[name].tensor(name, rectangle)

    def require(self, shapes: Mapping[str, Shape]) -> None:
        """Make sure that the tensors are exactly those that config.json implies.

        Raises:
            CheckpointError: listing what is missing, unexpected or of another shape.
        """
        if problems := differences(self.tensors(), shapes):
            more = [f"and {len(problems) - 10} more"] * (len(problems) > 10)
            lines = [f"the tensors in {self.path} are not those of its {CONFIG}:", *problems[:10], *more]
            raise CheckpointError("\n  ".join(lines))

    def _model_config(self) -> ModelConfig:
        try:
            model = ModelConfig.model_validate(model_config_from_hf(self.config))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{self.path / CONFIG}: {place} = {first['input']!r}: {first['msg']}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{self.path / error.args[0]}") from None
        if model.num_layers > len(self._files):  # before anybody lists the names of a billion layers
            raise CheckpointError(
                f"{self.path / CONFIG}: num_hidden_layers = {model.num_layers}, "
                f"but there are only {len(self._files)} tensors"
            )
        return model

    def _open_weights(self) -> dict[str, SafetensorsFile]:
        """The file of every tensor."""
        weight_map = self._weight_map()
        files: dict[str, SafetensorsFile] = {}
        for file_name in sorted(set(weight_map.values())):
            opened = SafetensorsFile(self._inside(file_name))
            listed = {name for name, file in weight_map.items() if file == file_name}
            if wrong := sorted(listed ^ set(opened.names)):
                where = "the index, but not the file" if wrong[0] in listed else "the file, but not the index"
                raise CheckpointError(f"{opened.path}: {wrong[0]} is in {where}")
            for name in opened.names:
                if name.endswith("rotary_emb.inv_freq"):  # a constant that old exports stored
                    self.ignored.append(name)
                elif opened.dtype(name) not in _FLOATS:
                    raise CheckpointError(f"{opened.path}: {name} has dtype {opened.dtype(name)}; known: {_FLOATS}")
                else:
                    files[name] = opened
        return files

    def _weight_map(self) -> dict[str, str]:
        """File by tensor name, from the index or the one file."""
        if (self.path / INDEX).exists():
            weight_map = self._json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{self.path / INDEX}: weight_map is missing or not a table of file names")
            return weight_map
        if not (self.path / SINGLE).exists():
            why = f"; {self.ignored[0]} may run code when it is opened and is refused" if self.ignored else ""
            raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}{why}")
        return dict.fromkeys(SafetensorsFile(self._inside(SINGLE)).names, SINGLE)

    def _inside(self, name: str) -> Path:
        """A file that lies in this directory, also after following links."""
        path = self.path / name
        if "\0" in name or path.resolve().parent != self.path.resolve():
            raise CheckpointError(
                f"{self.path}: {name!r} leads out of the directory; copy the files in (cp -rL follows links)"
            )
        require_file(path)
        return path

    def _json(self, name: str) -> dict[str, Any]:
        path = self._inside(name)
        return _parsed(path, read_file(path, _MAX_JSON_BYTES))


def import_directory(
    source: HuggingFaceDirectory, run_dir: Path | str, shapes: Mapping[str, Shape], progress: Progress | None = None
) -> Path:
    """Make a run directory whose checkpoint at step 0 holds the weights as fp32 masters, and nothing else.

    Its config.yaml has a `model` section alone: data, batch and schedule are for the next run to say.

    Args:
        shapes: names and shapes that `source.model` implies, in model order.

    Returns:
        the checkpoint directory.

    Raises:
        CheckpointError: the tensors are not exactly those; nothing is written then.
        ConfigError: `run_dir` exists and is not empty.
    """
    source.require(shapes)

    def piece(name: str, shape: Shape) -> Piece:
        def load() -> Tensor:
            tensor = source.read(name)
            if progress:
                progress(name, tensor.numel())
            return tensor

        return Piece("param", name, shape, Rectangle((0,) * len(shape), shape), load, dtype=torch.float32)

    state = State(0, 0, 0, "", {"imported": str(source.path)})
    with new_directory(Path(run_dir)) as partial:
        checkpoint = save(
            partial,
            (piece(name, shape) for name, shape in shapes.items()),
            state,
            config_yaml=yaml.safe_dump({"model": source.model.model_dump(mode="json")}, sort_keys=False),
            tokenizer_files=source.tokenizer_files,
            keep_last=1,
            rank=0,
            world_size=1,
            agree=lambda problem: problem,
        )
    return Path(run_dir) / checkpoint.relative_to(partial)


def export(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    out_dir: Path | str,
    shapes: Mapping[str, Shape],
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a Hugging Face directory, read it back, and only then give it its name.

    Args:
        tokenizer: the run's; None writes none.
        shapes: names and shapes that the model implies, in model order.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, or what was written does not read back.
        ConfigError: `out_dir` exists and is not empty, or the family cannot express the model.
    """
    checkpoint.require("param", shapes)
    model, files, out = checkpoint.model_config(), Storage(), Path(out_dir)
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eod_id) if tokenizer else (None, None)
    config = hf_config(model, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
    with new_directory(out) as partial:
        _write_json(files, partial / CONFIG, config)
        if tokenizer:
            _write_tokenizer(files, partial, checkpoint, tokenizer)
        _write_generation_config(files, partial / GENERATION_CONFIG, tokenizer)
        written = _write_weights(files, partial, checkpoint, shapes, dtype, shard_bytes, progress)
        _verify(partial, model, shapes, dtype, written)
    return out


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A place to fill that gets the name `target` when all went well and disappears when not.

    Raises:
        ConfigError: `target` exists and is not an empty directory.
        StorageError: there can be no such directory.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; name another directory, or remove it")
    files, partial = Storage(), target.with_name(target.name + ".partial")
    try:
        files.remove(partial)
        files.make_directory(partial, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the directory {target}: {error.strerror}; name another for --to") from error
    try:
        yield partial
        files.sync_directory(partial)
        files.rename(partial, target)
        files.sync_directory(target.parent)
    except BaseException:
        files.remove(partial)
        raise


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Tensor names by file name: in order, each file as full as `shard_bytes` allows."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_weights(
    files: Storage,
    partial: Path,
    checkpoint: Checkpoint,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    shard_bytes: int,
    progress: Progress | None,
) -> dict[str, Written]:
    def entry(name: str) -> Entry:
        def load() -> Tensor:
            tensor = checkpoint.read("param", name)
            if progress:
                progress(name, tensor.numel())
            return tensor

        return Entry(name, shapes[name], dtype, load)

    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, shard_bytes)
    written = {
        shard: files.write_safetensors(partial / shard, [entry(name) for name in names], {"format": "pt"})
        for shard, names in shards.items()
    }
    if len(shards) > 1:
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        _write_json(files, partial / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return written


def _write_tokenizer(files: Storage, partial: Path, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """The run's tokenizer files, and those that `transformers` needs where they are not among them."""
    sources = sorted(checkpoint.tokenizer_dir.iterdir()) if checkpoint.tokenizer_dir else []
    for source in sources:
        sentencepiece = tokenizer.kind == "sentencepiece" and source.name == tokenizer.files[0].name
        files.copy(source, partial / ("tokenizer.model" if sentencepiece else source.name))
    missing = {"tokenizer.json", "tokenizer_config.json"} - {source.name for source in sources}
    for name, content in _made_for_transformers(tokenizer).items() if missing else ():
        if name in missing:
            _write_json(files, partial / name, content)


def _made_for_transformers(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Files by name, but for a `tokenizer.json` that is there already."""
    if tokenizer.kind == "huggingface":
        special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id}
        names = {role: tokenizer.decode([i]) for role, i in special.items() if i is not None}
        return {"tokenizer_config.json": hf_tokenizer.settings(names)}
    pair = (
        hf_tokenizer.bytes_tokenizer()
        if tokenizer.kind == "byte"
        else hf_tokenizer.sentencepiece_tokenizer(tokenizer.files[0].read_bytes())
    )
    return dict(zip(("tokenizer.json", "tokenizer_config.json"), pair, strict=True))


def _write_generation_config(files: Storage, path: Path, tokenizer: Tokenizer | None) -> None:
    """What `generate` begins and ends with; the end of turn of a chat template belongs to it."""
    before = _parsed(path, path.read_bytes()) if path.exists() else None
    content = dict(before or {})
    if tokenizer is not None:
        ends = content.get("eos_token_id", tokenizer.eod_id)
        ends = list(dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), *_end_of_turn(tokenizer)]))
        content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        if tokenizer.bos_id is not None:
            content.setdefault("bos_token_id", tokenizer.bos_id)
    if content != before:
        files.remove(path)
        _write_json(files, path, content)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _end_of_turn(tokenizer: Tokenizer) -> list[int]:
    try:
        return [ChatEncoder(tokenizer, find_template(tokenizer)).end_of_turn_id]
    except ConfigError:  # no template, or one that ends turns with no token
        return []


def _write_json(files: Storage, path: Path, content: dict[str, Any]) -> None:
    files.write(path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _verify(
    partial: Path,
    model: ModelConfig,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    written: Mapping[str, Written],
) -> None:
    """Read everything back as a stranger would, and compare it with what was meant.

    Raises:
        CheckpointError: naming the tensor that differs.
    """
    found = HuggingFaceDirectory(partial)
    found.require(shapes)
    if found.model != model.model_copy(update=dict.fromkeys(SOURCES)):
        raise CheckpointError(f"{partial / CONFIG} does not read back as the model it was written for")
    hashes = {name: digest for file in written.values() for name, digest in file.hashes.items()}
    for name in shapes:
        tensor = found.read(name)
        if tensor.dtype != dtype or tensor_hash(tensor) != hashes[name]:
            raise CheckpointError(f"{partial}: {name} does not read back as it was written")
