"""The description of a dataset, `PREFIX.json`: its tokenizer, sources, counts and chat template."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from engine.data.storage.files import format_error
from engine.data.storage.format import dataset_file

Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,100}$")]  # safe to print to a terminal


class SourceFile(BaseModel):
    """An input file of the dataset and its size in bytes."""

    model_config = ConfigDict(frozen=True)

    path: str
    bytes: NonNegativeInt


class DatasetInfo(BaseModel):
    """The description in `PREFIX.json`; optional for reading tokens."""

    model_config = ConfigDict(frozen=True)

    tokenizer_kind: Name
    tokenizer_hash: Name
    vocab_size: PositiveInt
    eod_id: NonNegativeInt
    num_documents: NonNegativeInt = 0
    num_tokens: NonNegativeInt = 0
    version: str = ""
    sources: tuple[SourceFile, ...] = ()
    skipped: NonNegativeInt = 0
    chat_template: str | None = None  # Jinja source; fine-tuning datasets only
    end_of_turn_id: NonNegativeInt | None = None


def read_info(prefix: Path, num_tokens: int, num_documents: int) -> DatasetInfo | None:
    """Read the description of a dataset with these counts; None if the file does not exist.

    Raises:
        DataFormatError: the description is damaged or belongs to another dataset.
    """
    path = dataset_file(prefix, "json")
    try:
        info = DatasetInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise format_error(path, field, repr(first["input"])[:80], first["msg"]) from None
    counts = (("num_tokens", info.num_tokens, num_tokens), ("num_documents", info.num_documents, num_documents))
    for field, told, actual in counts:
        if told != actual:
            raise format_error(path, field, told, f"{actual} as in the .idx; is it another dataset's file?")
    return info
