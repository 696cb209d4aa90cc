import pytest
import torch

from engine.testing.runs import write_dataset

torch.set_num_threads(1)  # tests run side by side


@pytest.fixture
def workspace(tmp_path):
    """A directory with a small dataset `corpus` made with the byte tokenizer."""
    write_dataset(tmp_path / "corpus")
    return tmp_path
