import pytest

from engine.testing.runs import write_dataset


@pytest.fixture
def workspace(tmp_path):
    """A directory with a small dataset `corpus` made with the byte tokenizer."""
    write_dataset(tmp_path / "corpus")
    return tmp_path
