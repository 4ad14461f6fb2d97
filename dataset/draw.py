"""Random choices of the data sets, all through the generator handed in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose(items: Sequence, count: int, rng: np.random.Generator) -> list:
    """`count` different items, or all if there are fewer, in a random order."""
    return [items[i] for i in rng.choice(len(items), min(count, len(items)), replace=False)]


def pick(pool: Sequence[str], rng: np.random.Generator) -> str:
    """One sentence of a pool."""
    return pool[rng.integers(len(pool))]
