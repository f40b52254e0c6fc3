"""Batches: columns, regions, ignore values, fillers, parts of ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hermes_dist.stream.batch import Collator, StepBatch, local_part, micro_batch_count
from hermes_dist.stream.reader import Sample
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.augment import Draw

PATCH = (3, 4, 5)


def sample(dataset: int, seed: int = 0, values: tuple[int, ...] = (0, 1, 2, 3, 255)) -> Sample:
    rng = np.random.default_rng(seed)
    label = rng.choice(np.asarray(values, np.uint8), PATCH)
    return Sample(0, dataset, 0, 0, rng.normal(size=PATCH).astype(np.float32), label)


def test_columns_of_different_datasets(tasks: TaskTable) -> None:
    samples = [sample(0), sample(1, 1), sample(2, 2)]
    batch = Collator(tasks, PATCH).collate(samples)
    assert batch.image.shape == (3, 1, *PATCH)
    assert batch.image.dtype == torch.float32
    assert batch.label.dtype == torch.int16
    assert batch.task_ids.tolist() == [[0, 1, -1], [2, -1, -1], [3, 4, 5]]
    assert torch.equal(batch.pair_mask, batch.task_ids >= 0)
    assert batch.modality_ids.tolist() == [0, 1, 2]
    assert batch.modality_targets.tolist() == [0, -1, 2]  # "MR" does not state its sequence
    assert batch.ignore_values.tolist() == [-1, 255, -1]
    for i, s in enumerate(samples):
        assert np.array_equal(batch.image[i, 0].numpy(), s.image)
        assert np.array_equal(batch.label[i].numpy(), s.label)


def test_targets_against_isin(tasks: TaskTable) -> None:
    samples = [sample(0), sample(1, 1), sample(2, 2)]
    targets = Collator(tasks, PATCH).collate(samples).targets()
    assert targets.shape == (3, 3, *PATCH)
    assert targets.dtype == torch.bool
    for i, s in enumerate(samples):
        classes = tasks.datasets[s.dataset].classes
        for t in range(3):
            expected = np.isin(s.label, classes[t].values) if t < len(classes) else np.zeros(PATCH, bool)
            assert np.array_equal(targets[i, t].numpy(), expected)


def test_large_values_of_no_class_are_background(tasks: TaskTable) -> None:
    """In int16 the value 65535 would be -1, which fills up columns with fewer values."""
    label = np.where(sample(0, values=(0, 1, 2)).label == 0, np.uint16(65535), sample(0, values=(0, 1, 2)).label).astype(
        np.uint16
    )
    for numbers in (None, Draw()):
        one = Sample(0, 0, 0, 0, np.zeros(PATCH, np.float32), label, numbers)
        targets = Collator(tasks, PATCH).collate([one]).to("cpu").targets()[0].numpy()
        for t, entry in enumerate(tasks.datasets[0].classes):
            assert np.array_equal(targets[t], np.isin(label, entry.values))


def test_valid_voxels_leave_out_the_ignore_value_of_that_dataset_only(tasks: TaskTable) -> None:
    collator = Collator(tasks, PATCH)
    samples = [sample(0), sample(1, 1)]
    valid = collator.collate(samples).valid_voxels()
    assert valid is not None
    assert valid.shape == (2, *PATCH)
    assert valid[0].all()
    assert np.array_equal(valid[1].numpy(), samples[1].label != 255)
    assert collator.collate(samples[:1]).valid_voxels() is None


def test_cases_of_a_micro_batch_leave_out_fillers(tasks: TaskTable) -> None:
    collator = Collator(tasks, PATCH)
    batches = [collator.collate([sample(0), sample(1, 1)]), collator.collate([]), collator.collate([sample(2)])]
    step = StepBatch(0, batches, 1, 1, np.zeros(3, np.int64), np.arange(3), cases=["a/0", "b/1", "a/2"])
    assert [step.cases_of(i) for i in range(3)] == [["a/0", "b/1"], [], ["a/2"]]


def test_filler_has_no_valid_pair_but_tasks_to_run_with(tasks: TaskTable) -> None:
    filler = Collator(tasks, PATCH).collate([])
    assert filler.image.shape == (1, 1, *PATCH)
    assert not filler.pair_mask.any()
    assert filler.modality_targets.tolist() == [-1]
    assert (filler.task_ids >= 0).any()


def test_large_label_values_take_int32() -> None:
    table = TaskTable.build([("x", "CT", "body", [("a", (40000,))], None)])
    batch = Collator(table, PATCH).collate([Sample(0, 0, 0, 0, np.zeros(PATCH, np.float32), np.full(PATCH, 40000, np.uint16))])
    assert batch.label.dtype == torch.int32
    assert batch.targets().all()


@given(batch=st.integers(1, 40), world=st.integers(1, 16), step=st.integers(0, 10**6))
def test_parts_of_ranks_are_contiguous_and_even(batch: int, world: int, step: int) -> None:
    parts = [local_part(step * batch, batch, rank, world) for rank in range(world)]
    assert parts[0][0] == step * batch
    assert parts[-1][1] == (step + 1) * batch
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    sizes = [b - a for a, b in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("batch", "world", "micro", "expected"), [(16, 8, 1, 2), (16, 3, 2, 3), (2, 4, 4, 1), (7, 1, 3, 3)])
def test_micro_batches(batch: int, world: int, micro: int, expected: int) -> None:
    assert micro_batch_count(batch, world, micro) == expected
