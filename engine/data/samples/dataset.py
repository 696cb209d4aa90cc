"""The data of a run as training sees them: pretraining and fine-tuning samples behind one protocol."""

from typing import Protocol

from engine.data.samples.loader import Samples
from engine.data.storage.reader import IndexedDataset


class SampleDataset(Samples, Protocol):
    """Numbered samples, and the facts about them that a run needs; `PretrainDataset` and `SftDataset` are two.

    Attributes:
        datasets: the files behind it.
        num_tokens: places that an epoch fills, over all datasets.
        num_rows: sequences of an epoch; None where samples follow one another without end.
        efficiency: the share of the places of a sequence that hold tokens.
        mean_length: tokens of the conversation that a filled place belongs to, over all places; None: a whole sequence.
    """

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_rows(self) -> int | None: ...

    @property
    def efficiency(self) -> float: ...

    @property
    def mean_length(self) -> float | None: ...

    def fingerprint(self) -> str:
        """Identifies the data and their order; independent of the directory they lie in."""

    def summary(self) -> str | None:
        """How conversations are packed into sequences, for people; None where nothing is packed."""
