"""Ranks of one attempt agree on a name, whatever earlier attempts left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from hermes_dist.errors import WaitTimeoutError
from hermes_dist.parallel.meeting import agree_on_name


def attempt(store: dist.Store, world: int) -> set[str]:
    with ThreadPoolExecutor(world) as pool:
        return set(pool.map(lambda rank: agree_on_name(store, rank, world, 20), reversed(range(world))))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_attempt_has_one_name_of_its_own(world: int) -> None:
    store = dist.HashStore()
    names = [attempt(store, world) for _ in range(3)]
    assert all(len(n) == 1 for n in names)
    assert len(set.union(*names)) == 3


def test_another_world_size_in_the_same_store() -> None:
    store = dist.HashStore()
    names = [attempt(store, world) for world in (2, 4, 2)]
    assert all(len(n) == 1 for n in names)
    assert len(set.union(*names)) == 3


def test_a_rank_that_left_numbers_behind_is_not_counted_as_here() -> None:
    store = dist.HashStore()
    attempt(store, 2)
    with pytest.raises(WaitTimeoutError, match="rank 0 of 2 met no complete roll"):
        agree_on_name(store, 0, 2, 0.3)
