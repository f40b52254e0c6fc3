"""Mixtures: which share of the positions each dataset gets, exactly, in every block.

`shares` turns a configuration into fractions. `apportion` turns fractions into whole numbers per block of positions, by
largest remainder; what a block could not give is carried to the next one, so that a dataset whose share is below one
position per block still gets its turn, and the count after any number of blocks of a period differs from the ideal by less
than one. After `period` blocks the table repeats, and its rounding with it, which makes it O(1) at any position. Pure functions
on plain arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hermes_dist.config import MixtureConfig
from hermes_dist.errors import ConfigError, nearest

MAX_PERIOD = 1 << 15

HERMES_WEIGHTS: dict[str, float] = {
    "amos_ct": 1.8,
    "structseg_head_oar": 2.6,
    "mnm": 0.3,
    "autopet": 0.1,
    "amos_mr": 1.6,
    "brain_structure": 0.4,
    "kits": 0.3,
    "bcv": 1.5,
    "lits": 0.3,
    "structseg_oar": 0.7,
    "chaos": 0.5,
    "chaos_t1": 0.5,  # `chaos` there is two datasets in our recipe
    "chaos_t2": 0.5,
}
"""Weight of each *volume* by dataset in the released code of Hermes; a dataset's share is ∝ weight × volumes."""


def shares(names: Sequence[str], case_counts: Sequence[int], config: MixtureConfig) -> npt.NDArray[np.float64]:
    """Share of each dataset, summing to 1.

    Args:
        names: datasets that have cases in the split (a dataset of several stores counts once).
        case_counts: cases of each, all >= 1.
        config: temperature (share ∝ cases^alpha: 1 as nnU-Net on pooled data, ½ as MultiTalent, 0 as CLIP-Driven and
            UniSeg), explicit weights, or the published ones.

    Raises:
        ConfigError: a weight for an unknown dataset, a negative weight, no weight at all, or a dataset without a published one.
    """
    if config.weights is None:
        raw = np.asarray(case_counts, np.float64) ** config.alpha
        return raw / raw.sum()
    weights = volume_weights(names, case_counts) if config.weights == "hermes" else config.weights
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(
                f"data.mixture.weights names {name!r}, which has no case here; datasets: {', '.join(names)}."
                f"{nearest(name, names)}"
            )
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"data.mixture.weights[{name!r}] = {weight}: expected a finite number >= 0")
    raw = np.asarray([weights.get(name, 0.0) for name in names], np.float64)
    if raw.sum() <= 0:
        raise ConfigError("data.mixture.weights are all 0: give at least one dataset a positive weight")
    return raw / raw.sum()


def volume_weights(
    names: Sequence[str], case_counts: Sequence[int], per_volume: Mapping[str, float] = HERMES_WEIGHTS
) -> dict[str, float]:
    """Weights of a mixture that is stated per volume, as Hermes' is: weight × volumes for each dataset.

    Raises:
        ConfigError: a dataset that the table does not list.
    """
    for name in names:
        if name not in per_volume:
            raise ConfigError(
                f"no published weight for dataset {name!r} (data.mixture.weights); known: {', '.join(per_volume)}."
                f"{nearest(name, list(per_volume))}"
            )
    return {name: per_volume[name] * count for name, count in zip(names, case_counts, strict=True)}


def period_of(fractions: npt.NDArray[np.float64], block: int) -> int:
    """Blocks after which the table of `apportion` repeats: enough for 64 draws of the rarest dataset, if that is possible.

    Raises:
        ConfigError: a share so small that it would round to nothing.
    """
    smallest = float(fractions[fractions > 0].min())
    if smallest * block * MAX_PERIOD < 1:
        raise ConfigError(
            f"a mixture share of {smallest:.3g} is less than one position in {block * MAX_PERIOD}: "
            "give that dataset a larger weight, or leave it out (weight 0)"
        )
    wanted = int(np.ceil(64 / (smallest * block)))
    return int(min(max(256, 1 << (wanted - 1).bit_length()), MAX_PERIOD))


def apportion(fractions: npt.NDArray[np.float64], block: int, period: int) -> npt.NDArray[np.int64]:
    """Whole positions of each dataset in each block of one period.

    Args:
        fractions: (D,) shares, summing to 1.
        block: positions per block.
        period: blocks.

    Returns:
        (period, D) int64; each row sums to `block`, and after each row every dataset has its due to within less than one.
        The first row is the largest-remainder apportionment of `block`; row k is that of what is due after k + 1 blocks less
        what was given before. Where that strays by one or more somewhere (it can), the rows are those of `_by_deadline`.
    """
    counts = _by_remainder(fractions, block, period)
    due = fractions * (block * np.arange(1.0, period + 1))[:, None]
    return counts if (np.abs(counts.cumsum(axis=0) - due) < 1).all() else _by_deadline(fractions, block, period)


def _by_remainder(fractions: npt.NDArray[np.float64], block: int, period: int) -> npt.NDArray[np.int64]:
    counts = np.zeros((period, len(fractions)), np.int64)
    given = np.zeros(len(fractions), np.int64)
    for k in range(period):
        due = fractions * (block * (k + 1)) - given
        row = np.maximum(np.floor(due + 1e-9), 0).astype(np.int64)
        missing = block - int(row.sum())
        by_remainder = np.argsort(row - due, kind="stable")
        if missing >= 0:
            row[by_remainder[:missing]] += 1
        else:
            givers = [d for d in by_remainder[::-1] if row[d] > 0]
            row[givers[:-missing]] -= 1
        counts[k] = row
        given += row
    return counts


def _by_deadline(fractions: npt.NDArray[np.float64], block: int, period: int) -> npt.NDArray[np.int64]:
    """Tijdeman's chairman assignment: positions go to those that would otherwise be the first to lack one.

    A dataset may take its j-th position once that leaves it at most 1 - d ahead of its due, and must before it is so far
    behind, with d = 1 / (2 D - 2); earliest deadline first then always finds an assignment (Tijdeman, Discrete Math. 32, 1980).
    """
    spare = 1 / (2 * max(int((fractions > 0).sum()), 2) - 2)
    counts = np.zeros((period, len(fractions)), np.int64)
    given = np.zeros(len(fractions), np.int64)
    for k in range(period):
        free = np.floor(fractions * (block * (k + 1)) + 1 - spare + 1e-9).astype(np.int64) - given
        owner = np.repeat(np.arange(len(fractions)), free)
        nth = given[owner] + 1 + np.arange(len(owner)) - (np.cumsum(free) - free)[owner]
        first = np.argsort((nth - spare) / fractions[owner], kind="stable")[:block]
        counts[k] = np.bincount(owner[first], minlength=len(fractions))
        given += counts[k]
    return counts
