"""Uncertainty of every number: resample whole patients, and write each result as one tidy record.

A metric of this course is a function of sums over studies (or questions). So a bootstrap needs no text: draw
how often each patient occurs, `weights (1 + samples, n)`, multiply by the per-item counts `(n, k)`, and put
the sums into the metric's formula. Row 0 of the weights is all ones, so element 0 of a result is the point
estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lightmedvlm_utils.errors import UserError

PROTOCOL = "study"  # how texts are compared: see protocols.py


class Estimate(NamedTuple):
    """A value with its 95 % interval; the bounds are None where no resampling applies."""

    value: float
    low: float | None = None
    high: float | None = None


def bootstrap_weights(patients: Sequence, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each item counts, `(1 + samples, n)`: row 0 all ones, then resamples of whole patients.

    A patient's studies resemble each other, so patients are drawn with replacement, never single studies
    (cluster bootstrap). Equal arguments give equal weights: two systems scored with them are paired.
    """
    if len(patients) == 0:
        raise UserError("There is nothing to score: the evaluated split has no studies.")
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    count = index.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    return np.vstack([np.ones(count), drawn])[:, index]


def estimate(draws: np.ndarray) -> Estimate:
    """Point estimate (element 0), 2.5 and 97.5 percentiles of the resamples, of `(1 + samples,)` values."""
    resampled = draws[1:][~np.isnan(draws[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if resampled.size else (None, None)
    return Estimate(float(draws[0]), *(None if bound is None else float(bound) for bound in (low, high)))


def p_value(draws: np.ndarray) -> float | None:
    """Two-sided bootstrap p of a paired difference `(1 + samples,)`: how often resampling patients turns its sign.

    At least 1 / samples: more cannot be said of so many resamples. None where the difference does not exist.
    """
    resampled = draws[1:][~np.isnan(draws[1:])]
    if not resampled.size:
        return None
    tail = min((resampled <= 0).mean(), (resampled >= 0).mean())
    return float(np.clip(2 * tail, 1 / resampled.size, 1))


def difference_records(gaps: Mapping[str, np.ndarray], **about) -> list[dict]:
    """Records of paired differences, `{metric: draws}`, each with one of its p as metric "..._p"; `about` as for
    `records`."""
    scores: dict[str, np.ndarray | Estimate] = {}
    for metric, draws in gaps.items():
        p = p_value(draws)
        scores |= {metric: draws, f"{metric}_p": Estimate(np.nan if p is None else p)}
    return records(scores, **about)


def records(
    scores: Mapping[str, np.ndarray | Estimate],
    *,
    system: str,
    task: str,
    n: int,
    unit: str,
    protocol: str = PROTOCOL,
    section: str = "",
    split: str = "test",
) -> list[dict]:
    """Tidy records, one per metric, of draws or finished estimates: the rows of metrics.json.

    A value that does not exist (NaN) becomes None, so that the file is strict JSON.
    """
    rows = []
    for metric, score in scores.items():
        result = score if isinstance(score, Estimate) else estimate(score)
        value = None if np.isnan(result.value) else result.value
        row = {"system": system, "task": task, "metric": metric, "value": value}
        row |= {"low": result.low, "high": result.high, "n": n, "unit": unit}
        rows.append(row | {"protocol": protocol, "section": section, "split": split})
    return rows
