"""How sure a mean is: values of cases enter, a mean with a 95% interval leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Mean:
    """A mean and where it lies in 95% of the bootstrap samples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def positive(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0


def mean_over(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> Mean:
    """The mean of the groups' means, with the interval of a bootstrap over groups and over the values inside them.

    Cases of one task are alike: drawing cases alone would promise too narrow an interval (cluster bootstrap, Davison
    and Hinkley 1997, section 3.8).
    """
    table = _by_group(values, groups)
    random = np.random.default_rng(seed)
    chosen = random.integers(len(table), size=(DRAWS, len(table)))
    means = np.empty(chosen.shape)
    for k, group in enumerate(table):
        places = chosen == k
        means[places] = random.choice(group, size=(int(places.sum()), len(group))).mean(axis=1)
    low, high = np.percentile(means.mean(axis=1), (2.5, 97.5))
    return Mean(float(np.mean([group.mean() for group in table])), float(low), float(high))


def _by_group(values: Sequence[float], groups: Sequence[str]) -> list[NDArray[np.float64]]:
    if not values or len(values) != len(groups):
        raise ValueError(f"values: expected some, one for each of {len(groups)} groups' names, got {len(values)}")
    array, names = np.asarray(values, dtype=np.float64), np.asarray(groups)
    return [array[names == name] for name in dict.fromkeys(groups)]
