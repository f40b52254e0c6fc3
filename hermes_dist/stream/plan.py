"""The plan: position → dataset, case, crop rule and seeds. A pure function; the whole order of training is this file.

Positions are cut into blocks. A block holds an exact number of draws of each dataset (mixture.apportion), in an order given
by a keyed shuffle of the block. The k-th draw of a dataset of n cases is element k mod n of the keyed permutation of pass
k div n, so no case comes again before all of its dataset have come. Everything is arithmetic on (seed, position): nothing is
drawn in advance, nothing is stored, and position 10⁹ costs what position 10 costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hermes_dist.errors import ConfigError
from hermes_dist.stream.keyed import I64, U64, hash64, permute, text_key, uniform
from hermes_dist.stream.mixture import apportion, period_of

VERSION = 1
_ORDER, _CASE, _CROP, _AUGMENT, _FOREGROUND = range(1, 6)  # what a random number is for: the first part of its key
_BLOCKS_AT_ONCE = 256


@dataclass(frozen=True)
class Group:
    """The cases of one dataset: its name, its index in the task table, and its global case numbers in a fixed order."""

    name: str
    dataset: int
    cases: I64


@dataclass(frozen=True)
class PlanRows:
    """A run of positions as a struct of arrays, one entry a position.

    `group` indexes the plan's groups, `dataset` the task table, `case` the concatenated manifests; `draw` counts the draws of
    that group since position 0; `foreground` says whether the crop is centred on a class; the seeds drive crop and augmentation.
    """

    position: I64
    group: I64
    dataset: I64
    case: I64
    draw: I64
    foreground: npt.NDArray[np.bool_]
    crop_seed: U64
    augment_seed: U64

    def __len__(self) -> int:
        return len(self.position)

    def part(self, start: int, stop: int) -> PlanRows:
        """Rows [start, stop) of this run."""
        return PlanRows(*(getattr(self, f.name)[start:stop] for f in fields(self)))


class Plan:
    """Order of a whole training.

    Args:
        seed: `run.seed`.
        groups: datasets with at least one case each.
        fractions: (D,) shares of the groups, summing to 1 (mixture.shares).
        block: positions per block.
        foreground_probability: chance that a crop is centred on a class.

    Raises:
        ConfigError: no group, or a group without cases.
    """

    def __init__(
        self,
        seed: int,
        groups: Sequence[Group],
        fractions: npt.NDArray[np.float64],
        *,
        block: int = 256,
        foreground_probability: float = 0.5,
    ) -> None:
        if not groups:
            raise ConfigError("the plan has no dataset: no store holds a case of the split")
        for group in groups:
            if not len(group.cases):
                raise ConfigError(f"dataset {group.name!r} has no case in this split: leave it out or choose another split")
        self.seed = seed
        self.groups = tuple(groups)
        self.block = block
        self.foreground_probability = foreground_probability
        self.period = period_of(fractions, block)
        self._counts = apportion(fractions, block, self.period)
        self._before = np.concatenate([np.zeros((1, len(groups)), np.int64), self._counts.cumsum(axis=0)])
        self._case_counts = np.asarray([len(g.cases) for g in groups], np.int64)
        self._group_keys = np.asarray([text_key(g.name) for g in groups], np.uint64)
        self._datasets = np.asarray([g.dataset for g in groups], np.int64)
        self._first_case = np.concatenate([[0], self._case_counts.cumsum()[:-1]]).astype(np.int64)
        self._cases = np.concatenate([g.cases for g in groups]).astype(np.int64)

    def rows(self, start: int, stop: int) -> PlanRows:
        """The plan of positions [start, stop), 0 <= start <= stop < 2^62."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions [{start}, {stop}): expected 0 <= start <= stop")
        first, last = start // self.block, -(-stop // self.block)
        parts = [
            self._draws_of_blocks(b, min(b + _BLOCKS_AT_ONCE, last)) for b in range(first, max(last, first + 1), _BLOCKS_AT_ONCE)
        ]
        group, draw = (
            np.concatenate([p[i] for p in parts])[start - first * self.block : stop - first * self.block] for i in (0, 1)
        )
        position = np.arange(start, stop, dtype=np.int64)
        return PlanRows(
            position=position,
            group=group,
            dataset=self._datasets[group],
            case=self._case_of_draw(group, draw),
            draw=draw,
            foreground=uniform(_FOREGROUND, self.seed, position) < self.foreground_probability,
            crop_seed=hash64(_CROP, self.seed, position),
            augment_seed=hash64(_AUGMENT, self.seed, position),
        )

    def substitute(self, group: int, draw: int, attempt: int) -> int:
        """Case that replaces draw `draw` of `group` at the `attempt`-th replacement (1, 2, …): the case of a following draw.

        It depends on nothing but its arguments, so every rank and every worker replaces an unreadable case alike.
        """
        return int(self._case_of_draw(np.asarray([group]), np.asarray([draw + attempt]))[0])

    @property
    def digest(self) -> str:
        """Hash of all that the order depends on: seed, datasets, cases, shares, block. A checkpoint keeps it."""
        state = hashlib.blake2b(f"{VERSION} {self.seed} {self.block} {self.foreground_probability!r}".encode(), digest_size=16)
        for group in self.groups:
            state.update(f"{group.name}\0{group.dataset}\0".encode() + group.cases.astype("<i8").tobytes())
        state.update(self._counts.astype("<i8").tobytes())
        return state.hexdigest()

    def _draws_of_blocks(self, first: int, last: int) -> tuple[I64, I64]:
        """(group, draw) of every position of the blocks [first, last)."""
        block, n_groups = self.block, len(self.groups)
        blocks = np.arange(first, last, dtype=np.int64)
        position = blocks[:, None] * block + np.arange(block, dtype=np.int64)
        shuffled = np.argsort(hash64(_ORDER, self.seed, position), axis=1, kind="stable")
        counts = self._counts[blocks % self.period]
        by_group = np.repeat(np.tile(np.arange(n_groups), len(blocks)), counts.ravel()).reshape(len(blocks), block)
        group = np.empty_like(by_group)
        np.put_along_axis(group, shuffled, by_group, axis=1)
        # Draws count up with the position, so that a pass over a dataset ends before the next one begins.
        in_order = np.argsort(group, axis=1, kind="stable")
        starts = counts.cumsum(axis=1) - counts
        rank = np.arange(block) - np.take_along_axis(starts, by_group, axis=1)
        draw = np.empty_like(group)
        np.put_along_axis(draw, in_order, rank, axis=1)
        before = (blocks // self.period)[:, None] * self._before[-1] + self._before[blocks % self.period]
        draw += np.take_along_axis(before, group, axis=1)
        return group.ravel(), draw.ravel()

    def _case_of_draw(self, group: I64, draw: I64) -> I64:
        count = self._case_counts[group]
        key = hash64(_CASE, self.seed, self._group_keys[group], draw // count)
        return self._cases[self._first_case[group] + permute(draw % count, count, key)]
