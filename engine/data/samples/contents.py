"""Whether the data of a run are those that were written, and those that it began with."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from engine.data.samples.dataset import SampleDataset
from engine.data.storage.reader import IndexedDataset

Contents = dict[str, list[str]]
"""For each dataset of a run, by name, its `IndexedDataset.identity`."""


def verify_first(samples: SampleDataset, numbers: Iterable[int]) -> None:
    """Check the checksums of the blocks that the samples `numbers` read.

    Raises:
        DataFormatError: a block has changed since the dataset was written.
    """
    spans = [span for i in numbers for span in samples.spans(i)]
    for data in samples.datasets:
        data.verify_spans([(start, count) for owner, start, count in spans if owner is data])


def contents(datasets: Sequence[IndexedDataset]) -> Contents:
    """Return what identifies the data of a run; datasets of the same name are numbered."""
    seen: Counter[str] = Counter()
    found = {}
    for data in datasets:
        name = data.prefix.name
        found[f"{name}#{seen[name]}" if seen[name] else name] = data.identity()
        seen[name] += 1
    return found


def changed(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of the datasets of both whose contents differ. Checksums count only if both have them."""
    return [name for name in now if any(a != b for a, b in zip(before.get(name, ()), now[name], strict=False))]
