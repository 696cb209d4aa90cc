"""The dataset interface that training uses, for pretraining and fine-tuning."""

from typing import Protocol

from engine.data.samples.loader import Samples
from engine.data.storage.reader import IndexedDataset


class SampleDataset(Samples, Protocol):
    """Numbered samples and their properties; implemented by `PretrainDataset` and `SftDataset`.

    Attributes:
        datasets: the underlying files.
        num_tokens: tokens of an epoch without padding, over all datasets.
        num_rows: sequences of an epoch; None if the samples are endless.
        efficiency: the fraction of the tokens of a sequence that are not padding.
        mean_length: tokens of the conversation that a token belongs to, averaged over all tokens; None: the
            whole sequence.
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

    def spans(self, i: int) -> list[tuple[IndexedDataset, int, int]]:
        """Return the tokens that sample `i` reads, as (dataset, first token, number of tokens)."""

    def fingerprint(self) -> str:
        """Return a hash of the data and their order, independent of their directory."""

    def passes(self, num_samples: int) -> list[float]:
        """Return how often the first `num_samples` samples read each dataset."""

    def summary(self) -> str | None:
        """Return a line about the packing of conversations into sequences; None for pretraining."""
