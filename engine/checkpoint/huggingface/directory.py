"""Reads Hugging Face directories as untrusted input: no pickles, no code, no files outside of the directory."""

import math
import os
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from engine.checkpoint.huggingface.config import ignored_settings, model_config_from_hf
from engine.checkpoint.huggingface.files import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    Json,
    read_json,
)
from engine.checkpoint.model_directory import ROW_BLOCK_BYTES, require_shapes
from engine.checkpoint.rectangles import Shape, row_blocks, whole
from engine.checkpoint.safetensors_file import SafetensorsFile, require_file
from engine.config.schema import ModelConfig
from engine.data.tokenizers.files import MODEL_FILES
from engine.errors import CheckpointError
from engine.formatting import counted
from engine.model.families import family_of
from engine.parallel.table import Rectangle

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 8192  # of embedding and head, compared at a time
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_FLOATS = ("F64", "F32", "BF16", "F16")


class HuggingFaceDirectory:
    """An opened Hugging Face model directory; a `ModelDirectory`. Nothing in it is trusted, executed or unpickled.

    Attributes:
        model: the architecture that config.json describes.
        tokenizer_files: empty if there is no tokenizer.
        ignored: pickle files, which are not read, dropouts, and tensors that are not parameters.

    Raises:
        CheckpointError: with the rejected file and the reason.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"no such model directory: {self.path} (nothing is downloaded; `hf download` does that)"
            )
        names = sorted(entry.name for entry in self.path.iterdir())
        if code := [name for name in names if name.endswith(".py")]:
            raise CheckpointError(f"{self.path / code[0]}: directories with code are rejected")
        self.config = read_json(self._inside(CONFIG))
        self.ignored = [name for name in names if name.endswith(_PICKLES)] + ignored_settings(self.config)
        self._files = self._open_weights()
        self.model = self._model_config()
        self._parts = self._stacked_parts()
        has_tokenizer = not set(MODEL_FILES).isdisjoint(names)
        self.tokenizer_files = [self._inside(name) for name in names if name in TOKENIZER_FILES and has_tokenizer]

    @property
    def tokenizer_spec(self) -> str | None:
        """The argument for `load_tokenizer`; None if there are no tokenizer files."""
        return str(self.path) if self.tokenizer_files else None

    def generation_config(self) -> Json:
        """Return the object in generation_config.json; empty if there is none."""
        return read_json(self._inside(GENERATION_CONFIG)) if (self.path / GENERATION_CONFIG).exists() else {}

    def tensors(self) -> dict[str, Shape]:
        """Return names and shapes of the parameters."""
        stacks = {stack for stack, _, _ in self._parts.values()}
        shapes = {name: file.shape(name) for name, file in self._files.items() if name not in stacks}
        return shapes | {
            name: (rows, *self._files[stack].shape(stack)[1:]) for name, (stack, _, rows) in self._parts.items()
        }

    def read(self, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """Read a rectangle (default: all) of a tensor, in the stored dtype; only its rows are read.

        Raises:
            CheckpointError: the file is damaged, or a value is not a finite number.
        """
        if name in self._parts:
            name, rectangle = self._in_stack(name, rectangle)
        tensor = self._files[name].tensor(name, rectangle)
        # as fast as memory; NaN is both extremes, and values of fp64 may be infinite in the masters
        if tensor.numel() and not all(math.isfinite(extreme.float()) for extreme in tensor.aminmax()):
            count = int((~torch.isfinite(tensor.float())).sum())
            raise CheckpointError(
                f"{self._files[name].path}: {name} is damaged: {counted(count, 'value')} NaN or infinite in fp32"
            )
        return tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Read a whole tensor in blocks of rows, in order, as `read`."""
        for block in row_blocks(self.tensors()[name], ROW_BLOCK_BYTES // torch.float32.itemsize):
            yield self.read(name, block)

    def _in_stack(self, name: str, rectangle: Rectangle | None) -> tuple[str, Rectangle]:
        """Return the stored tensor that has the rows of `name`, and the rectangle in it."""
        stack, first, rows = self._parts[name]
        rectangle = rectangle or whole((rows, *self._files[stack].shape(stack)[1:]))
        return stack, Rectangle((rectangle.start[0] + first, *rectangle.start[1:]), rectangle.extent)

    def _stacked_parts(self) -> dict[str, tuple[str, int, int]]:
        """Return by name (stored tensor, first row, rows) of each weight that is stored with others in one tensor."""
        parts: dict[str, tuple[str, int, int]] = {}
        for stack, rows_of in family_of(self.model.family).stacked.items():
            rows = rows_of(self.model)
            for stored in self._files:
                prefix = stored.removesuffix(f"{stack}.weight")
                if prefix != stored and self._files[stored].shape(stored)[:1] == (sum(rows.values()),):
                    firsts = accumulate(rows.values(), initial=0)
                    parts |= {
                        f"{prefix}{part}.weight": (stored, first, count)
                        for (part, count), first in zip(rows.items(), firsts, strict=False)
                    }
        return parts

    def require(self, shapes: Mapping[str, Shape]) -> None:
        """Check that the tensors are exactly those that config.json implies.

        Raises:
            CheckpointError: lists tensors that are missing, unexpected or of another shape.
        """
        self._leave_out_tied_head()
        require_shapes(self.tensors(), shapes, f"the tensors in {self.path} are not those of its {CONFIG}:")

    def _leave_out_tied_head(self) -> None:
        """Leave out a head that is stored although it is the embedding.

        Raises:
            CheckpointError: it has other values, which transformers would not use.
        """
        shapes = self.tensors()
        shape = shapes.get(HEAD, ())
        if not self.model.tie_embeddings or len(shape) != 2 or shape != shapes.get(EMBEDDING):
            return  # if anything is wrong, `require` says it
        for start in range(0, shape[0], ROWS):
            rows = Rectangle((start, 0), (min(ROWS, shape[0] - start), shape[1]))
            if not torch.equal(self.read(HEAD, rows), self.read(EMBEDDING, rows)):
                raise CheckpointError(
                    f"{self.path}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings says that they are one; "
                    f"set tie_word_embeddings to false in {CONFIG} to use both, or remove {HEAD}"
                )
        del self._files[HEAD]
        self.ignored.append(f"{HEAD} (the embedding once more)")

    def _model_config(self) -> ModelConfig:
        layers = self.config.get("num_hidden_layers")
        if isinstance(layers, int) and layers > len(self._files):  # before up to a billion layers are listed
            raise CheckpointError(
                f"{self.path / CONFIG}: num_hidden_layers = {layers}, but there are only {len(self._files)} tensors"
            )
        try:
            return ModelConfig.model_validate(model_config_from_hf(self.config))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            seen = f"{place} = {first['input']!r}: " if place else ""
            raise CheckpointError(f"{self.path / CONFIG}: {seen}{first['msg']}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{self.path / error.args[0]}") from None

    def _open_weights(self) -> dict[str, SafetensorsFile]:
        """Open the weight files. Return the file of each tensor."""
        weight_map = self._weight_map()
        files: dict[str, SafetensorsFile] = {}
        for file_name in sorted(set(weight_map.values())):
            opened = SafetensorsFile(self._inside(file_name))
            listed = {name for name, file in weight_map.items() if file == file_name}
            if wrong := sorted(listed ^ set(opened.names)):
                where = "the index, but not the file" if wrong[0] in listed else "the file, but not the index"
                raise CheckpointError(f"{opened.path}: {wrong[0]} is in {where}")
            for name in opened.names:
                if name.endswith("rotary_emb.inv_freq"):  # a constant stored by old exports
                    self.ignored.append(name)
                elif opened.dtype(name) not in _FLOATS:
                    raise CheckpointError(f"{opened.path}: {name} has dtype {opened.dtype(name)}; known: {_FLOATS}")
                else:
                    files[name] = opened
        return files

    def _weight_map(self) -> dict[str, str]:
        """Return file names by tensor name, from the index or the single file."""
        if os.path.lexists(self.path / INDEX):
            weight_map = read_json(self._inside(INDEX)).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{self.path / INDEX}: weight_map is missing or not a table of file names")
            return weight_map
        if not os.path.lexists(self.path / SINGLE):
            why = ""
            if self.ignored:
                why = (
                    f"; {self.ignored[0]} may run code when it is opened and is rejected; if you trust it, convert it: "
                    f"AutoModelForCausalLM.from_pretrained({str(self.path)!r}).save_pretrained('NEW') in transformers "
                    f"writes safetensors"
                )
            raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}{why}")
        return dict.fromkeys(SafetensorsFile(self._inside(SINGLE)).names, SINGLE)

    def _inside(self, name: str) -> Path:
        """Return the path of a file in this directory; reject a link that leads out of it.

        In the cache of the Hub, a directory REPOSITORY/snapshots/REVISION holds links to REPOSITORY/blobs.
        """
        path, here = self.path / name, self.path.resolve()
        homes = {here, here.parents[1] / "blobs"} if here.parent.name == "snapshots" else {here}
        if "\0" in name or path.resolve().parent not in homes:
            raise CheckpointError(
                f"{self.path}: {name!r} leads out of the directory; copy the files in (cp -rL follows links)"
            )
        require_file(path)
        return path
