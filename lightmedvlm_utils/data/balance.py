"""Balancing the training split with the clusters: five strategies, and what each does to every label."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS

STRATEGIES = ("none", "cap", "thesis", "inverse-frequency", "random")
# The thesis dropped 50,000 of the 61,228 studies in its "No Finding" cluster.
_THESIS_SHARE = 50_000 / 61_228
_MAX_WEIGHT = 10.0  # in inverse-frequency sampling no study counts more than this many times the average


def balance(train: pd.DataFrame, strategy: str = "cap", seed: int = 0, cap: float = 0.1) -> pd.DataFrame:
    """A balanced copy of the training split; give it no other split, test data stay as they are.

    `train` holds study_id, the 14 labels and `cluster` (-1 noise).

    - "cap": no cluster keeps more than the share `cap` of the rows; noise, the rare combinations, stays whole.
    - "thesis": drops all noise and 82 % of the clustered No Finding studies, as the thesis did.
    - "inverse-frequency": as many rows as before, drawn with repetition, the rarer a study's rarest label the
      more often.
    - "random": as many rows as "cap" keeps, any of them: what fewer studies do without any balance.
    - "none": the split as it is.

    Rows come sorted by study_id; the result depends on the studies and the seed, not on the order of the rows.
    Raises UserError on an unknown strategy or a missing column.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"There is no balancing strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    missing = [column for column in ("study_id", "cluster", *LABELS) if column not in train]
    if missing:
        raise UserError(f"The training table has no column {', '.join(missing)}; run notebook 02 first.")
    train = train.sort_values("study_id", kind="stable", ignore_index=True)
    rng = np.random.default_rng(seed)
    rows = np.arange(len(train))
    if strategy in ("cap", "random"):
        rows = _cap(train, rng, max(1, round(cap * len(train))))
    if strategy == "random":
        rows = rng.permutation(len(train))[: len(rows)]
    if strategy == "thesis":
        rows = _thesis(train, rng)
    if strategy == "inverse-frequency":
        rows = _inverse_frequency(train, rng)
    return train.iloc[np.sort(rows)].reset_index(drop=True)


def _cap(train: pd.DataFrame, rng: np.random.Generator, most: int) -> np.ndarray:
    clusters = train["cluster"].to_numpy()
    kept = [np.flatnonzero(clusters < 0)]
    for cluster in np.unique(clusters[clusters >= 0]):
        kept.append(rng.permutation(np.flatnonzero(clusters == cluster))[:most])
    return np.concatenate(kept)


def _thesis(train: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    clustered = train["cluster"].to_numpy() >= 0
    normal = clustered & (train["No Finding"] == 1).to_numpy()
    dropped = rng.permutation(np.flatnonzero(normal))[: round(_THESIS_SHARE * normal.sum())]
    return np.setdiff1d(np.flatnonzero(clustered), dropped)


def _inverse_frequency(train: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    positive = (train[list(LABELS)] == 1).to_numpy()
    frequency = np.maximum(positive.mean(axis=0), 1 / len(train))
    # A study without any positive label weighs like the most frequent label.
    weights = np.where(positive, 1 / frequency, 1 / frequency.max()).max(axis=1)
    weights = np.minimum(weights, _MAX_WEIGHT * np.mean(weights))
    return rng.choice(len(train), size=len(train), p=weights / weights.sum())


def balance_table(train: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What every strategy leaves: rows, distinct studies and positive rows per label; one column a strategy."""
    columns = {}
    for strategy in STRATEGIES:
        balanced = balance(train, strategy, seed)
        counts = (balanced[list(LABELS)] == 1).sum()
        totals = pd.Series({"Studies": len(balanced), "Distinct studies": balanced["study_id"].nunique()})
        columns[strategy] = pd.concat([totals, counts])
    return pd.DataFrame(columns)
