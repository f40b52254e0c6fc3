from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from hermes_dist.config import LossConfig
from hermes_dist.models.output import ModelOutput
from hermes_dist.stream.batch import Batch, StepBatch
from hermes_dist.tasks import TaskTable
from hermes_dist.train.record import LossSums
from hermes_dist.train.step import StepLoss, ask, chain_hash

CONFIG = LossConfig(overlap="dice", modality_weight=0.1)
TASKS = TaskTable.build([("a", "CT", "x", [(f"c{i}", [i + 1]) for i in range(6)], None)])


class TinyModel(nn.Module):
    """Enough of a model: per-task scale of the image, and modality logits from its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, 6))
        self.modality = nn.Parameter(torch.linspace(0, 1, 3))

    def forward(self, image, task_ids, modality_ids):
        logits = image * self.scale[task_ids.clamp_min(0)][..., None, None, None]
        return ModelOutput(logits, None, image.mean((1, 2, 3, 4))[:, None] * self.modality)


def make_batch(n_tasks: list[int], seed: int, ignore: int = -1) -> Batch:
    rng = np.random.default_rng(seed)
    batch, columns, values = len(n_tasks), max(n_tasks), 7
    ids = torch.full((batch, columns), -1)
    class_values = torch.zeros(batch, columns, values, dtype=torch.bool)
    for b, n in enumerate(n_tasks):
        ids[b, :n] = torch.from_numpy(rng.permutation(6)[:n])
        for t in range(n):
            class_values[b, t, t + 1] = True
    return Batch(
        image=torch.from_numpy(rng.normal(size=(batch, 1, 4, 4, 4))).float(),
        label=torch.from_numpy(rng.integers(0, values, (batch, 4, 4, 4))),
        class_values=class_values,
        task_ids=ids,
        modality_ids=torch.arange(batch) % 3,
        modality_targets=torch.arange(batch) % 3,
        dataset_ids=torch.zeros(batch, dtype=torch.long),
        ignore_values=torch.full((batch,), ignore),
        pair_mask=ids >= 0,
    )


def rows(batch: Batch, index: slice) -> Batch:
    return Batch(**{name: getattr(batch, name)[index] for name in batch.__dataclass_fields__})


def gradients(parts: list[Batch], pairs: int, samples: int) -> tuple[torch.Tensor, LossSums]:
    model, sums = TinyModel(), LossSums.zeros(TASKS, torch.device("cpu"))
    step = StepBatch(
        step=0, micro_batches=parts, pair_count=pairs, modality_count=samples, identities=np.zeros(0, np.int64),
        positions=np.zeros(0, np.int64), data_wait_s=0.0, wait_parts_s={}, events=[],
    )  # fmt: skip
    loss_fn = StepLoss(CONFIG, step, sums, null_column=False)
    for part in parts:
        loss_fn(model, part).backward()
    return torch.cat([model.scale.grad, model.modality.grad]), sums


@pytest.mark.parametrize("ignore", [-1, 6])
@pytest.mark.parametrize("split", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_gradients_of_any_micro_batching_are_those_of_the_whole_batch(split, ignore):
    whole = make_batch([3, 1, 2, 5], seed=1, ignore=ignore)
    reference, sums = gradients([whole], pairs=11, samples=4)
    edges = np.cumsum([0, *split])
    parts = [rows(whole, slice(a, b)) for a, b in pairwise(edges)]
    found, split_sums = gradients(parts, pairs=11, samples=4)
    torch.testing.assert_close(found, reference)
    torch.testing.assert_close(split_sums.packed(), sums.packed())


def test_voxels_that_nobody_annotated_do_not_count():
    """A sample with ignored voxels has the loss of one that never had them."""
    whole = make_batch([3], seed=4, ignore=6)
    kept = (whole.label[0] != 6).flatten()
    assert 0 < kept.sum() < kept.numel()
    n = int(kept.sum())
    cut = rows(whole, slice(0, 1)).__dict__ | {
        "image": whole.image.flatten(2)[:, :, kept].view(1, 1, 1, 1, n),
        "label": whole.label.flatten(1)[:, kept].view(1, 1, 1, n),
    }
    model, losses = TinyModel(), []
    for batch in (whole, Batch(**cut)):
        step = StepBatch(0, [batch], 3, 0, np.zeros(0, np.int64), np.zeros(0, np.int64))
        loss_fn = StepLoss(
            LossConfig(overlap="dice", modality_weight=0), step, LossSums.zeros(TASKS, torch.device("cpu")), null_column=False
        )
        losses.append(loss_fn(model, batch))
    torch.testing.assert_close(losses[0], losses[1])


def test_foreground_counts_the_pairs_whose_crop_shows_the_class():
    whole = make_batch([3, 2], seed=5)
    whole.label[1] = torch.where(whole.label[1] == 2, 2, 0)
    _, sums = gradients([whole], pairs=5, samples=2)
    assert sums.per_class[3].tolist() == [2, 2, 1, 0, 0, 0]
    assert sums.foreground.tolist() == [1, 2, 1, 0, 0, 0]


def test_filler_samples_change_nothing():
    whole = make_batch([3, 1], seed=2)
    reference, _ = gradients([whole], pairs=4, samples=2)
    filler = make_batch([2], seed=3)
    filler.pair_mask[:] = False
    filler.modality_targets[:] = -1
    found, _ = gradients([whole, filler], pairs=4, samples=2)
    torch.testing.assert_close(found, reference)


def test_the_null_column_is_asked_and_dropped():
    seen = {}

    def model(image, task_ids, modality_ids):
        seen["ids"] = task_ids
        return ModelOutput(torch.zeros(1, task_ids.shape[1], 2, 2, 2), None, None)

    output = ask(model, torch.zeros(1, 1, 2, 2, 2), torch.tensor([[4, 2]]), torch.tensor([0]), null_column=True)
    assert seen["ids"].tolist() == [[4, 2, -1]]
    assert output.mask_logits.shape[1] == 2


def test_chain_hash_does_not_depend_on_who_held_which_sample():
    positions, identities = np.arange(8), np.arange(8) * 7 - 3
    whole = chain_hash("", positions, identities)
    order = np.random.default_rng(0).permutation(8)
    assert chain_hash("", positions[order], identities[order]) == whole
    assert chain_hash("", positions, identities[::-1].copy()) != whole
    assert chain_hash(whole, positions + 8, identities) != chain_hash("", positions + 8, identities)
