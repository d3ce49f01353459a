"""Many runs as few numbers."""

import statistics
from collections.abc import Iterable, Sequence

import numpy as np


def rates(tokens: int, seconds: Sequence[float]) -> list[float]:
    """Tokens a second of each run."""
    return [tokens / elapsed for elapsed in seconds]


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """The median and the 99th percentile, linear between neighbours."""
    p50, p99 = np.percentile(list(values), [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


def median(values: Iterable[float]) -> float:
    """The middle one."""
    return float(statistics.median(values))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and how far the least and the most are from it."""
    middle = median(values)
    return middle, middle - min(values), max(values) - middle
