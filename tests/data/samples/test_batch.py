"""Batches: shapes, masks, targets, and how they move."""

import copy

import numpy as np
import pytest
import torch

from engine.data.samples import batch as batch_module
from engine.data.samples.batch import Batch, collate
from engine.data.samples.sample import Sample

CONTENTS = [(np.arange(5), np.array([1, 3])), (np.arange(10, 15), np.array([], np.int64))]
SAMPLES = [Sample.following(*content) for content in CONTENTS]


def test_a_batch_with_document_mask():
    batch = collate(SAMPLES, (7, 9), document_mask=True)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14]]
    assert batch.positions.tolist() == [[0, 0, 1, 0], [0, 1, 2, 3]]
    assert batch.loss_mask.tolist() == [[1.0] * 4] * 2
    assert batch.cu_seqlens == (0, 1, 3, 4, 8)
    assert batch.sample_numbers == (7, 9)
    assert batch.num_tokens == 8 and type(batch.num_tokens) is int
    kinds = [batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype, batch.loss_mask.dtype]
    assert kinds == [torch.int64, torch.int64, torch.int64, torch.float32]
    assert all(type(offset) is int for offset in batch.cu_seqlens)


def test_a_batch_without_document_mask():
    samples = [Sample.following(np.arange(5), np.array([1, 3]))] * 2
    batch = collate(samples, (0, 1), document_mask=False)
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.cu_seqlens == (0, 4, 8)


def test_a_batch_moves_as_a_whole():
    batch = collate(SAMPLES, (7, 9), document_mask=True)
    moved = batch.to("meta")
    assert {moved.tokens.device, moved.labels.device, moved.loss_mask.device, moved.positions.device} == {
        torch.device("meta")
    }
    assert (moved.cu_seqlens, moved.sample_numbers) == (batch.cu_seqlens, batch.sample_numbers)


def test_a_batch_crosses_processes_without_shared_memory():
    batch = collate(SAMPLES, (7, 9), document_mask=True)
    rebuild, fields = batch.__reduce__()
    assert all(isinstance(array, np.ndarray) for array in fields[0])
    again = rebuild(*fields)
    assert isinstance(again, Batch)
    assert torch.equal(again.positions, batch.positions)


@pytest.mark.parametrize(("multiple", "indices"), [(1, [0, 2, 4, 5, 6, 7]), (7, [0, 1, 2, 4, 5, 6, 7]), (8, None)])
def test_labels_that_are_no_targets_do_not_count(monkeypatch, multiple, indices):
    monkeypatch.setattr(batch_module, "ROUND", multiple)
    mask = np.array([True, False, True, False])
    following = Sample.following(np.arange(5), np.array([], int))
    samples = [Sample(np.arange(4), np.arange(4) + 7, np.array([2]), mask), following]
    batch = collate(samples, (0, 1), document_mask=True)
    assert batch.labels.tolist() == [[7, 8, 9, 10], [1, 2, 3, 4]]
    assert batch.loss_mask.tolist() == [[1.0, 0.0, 1.0, 0.0], [1.0] * 4]
    assert batch.num_tokens == 6
    sent = copy.deepcopy(batch)  # as it crosses processes
    assert sent.loss_mask.equal(batch.loss_mask)
    assert (None if sent.target_indices is None else sent.target_indices.tolist()) == indices
    assert collate(samples[1:], (1,), document_mask=True).target_indices is None
