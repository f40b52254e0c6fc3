"""Keyed hashes and permutations: the randomness of the plan as arithmetic on counters, without state.

A random number here is a function of (key, counter), so the value for position 1,000,000,000 costs as much as the one for
position 10, and every machine computes the same one. The mixer is the finaliser of splitmix64 (Steele, Lea, Flood,
OOPSLA 2014); the permutation is a Feistel network over the next power of two with cycle walking (Black, Rogaway, CT-RSA
2002). Neither is meant as cryptography.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 8


def text_key(text: str) -> int:
    """A 64-bit key for a name, the same on every machine and Python (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash64(*parts: npt.ArrayLike) -> U64:
    """Hash of integer arrays that broadcast against each other, element by element.

    Args:
        parts: integers or integer arrays; negative ones count as their two's complement.

    Returns:
        uint64 array of the broadcast shape.
    """
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for part in parts:
            state = _mix((state + _GOLDEN) ^ _mix(_as_u64(part) + _GOLDEN))
        return np.asarray(state, np.uint64)


def uniform(*parts: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, one per element of the broadcast parts."""
    return (hash64(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(count: npt.ArrayLike, *parts: npt.ArrayLike) -> I64:
    """Uniform integers in [0, count), one per element (a bias of at most count / 2^53)."""
    return np.floor(uniform(*parts) * np.asarray(count, np.int64)).astype(np.int64)


def permute(index: npt.ArrayLike, count: npt.ArrayLike, key: npt.ArrayLike) -> I64:
    """Image of `index` under the permutation of range(count) that `key` selects, element by element.

    Args:
        index: int array with 0 <= index < count.
        count: size of each element's permutation, >= 1.
        key: each element's key (uint64).

    Returns:
        int64 array; for fixed count and key a bijection of range(count).
    """
    index, count, key = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(count, np.int64), _as_u64(key))
    bits = np.maximum(np.ceil(np.log2(np.maximum(count, 1))).astype(np.int64), 2)
    bits += (np.int64(1) << bits) < count
    low_bits = (bits // 2).astype(np.uint64)
    high_bits = bits.astype(np.uint64) - low_bits
    value = index.astype(np.uint64)
    limit = count.astype(np.uint64)
    todo = np.ones(value.shape, bool)
    while todo.any():
        value[todo] = _feistel(value[todo], low_bits[todo], high_bits[todo], key[todo])
        todo = value >= limit
    return value.astype(np.int64)


def _feistel(value: U64, low_bits: U64, high_bits: U64, key: U64) -> U64:
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    low, high = value & low_mask, value >> low_bits
    for number in range(0, _ROUNDS, 2):
        high = high ^ (hash64(key, number, low) & high_mask)
        low = low ^ (hash64(key, number + 1, high) & low_mask)
    return (high << low_bits) | low


def _mix(value: U64) -> U64:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def _as_u64(part: npt.ArrayLike) -> U64:
    if isinstance(part, int):
        return np.asarray(part & 0xFFFFFFFFFFFFFFFF, np.uint64)
    return np.asarray(part).astype(np.uint64)
