"""What a model must beat: systems that have not seen the patient's image, or only looked for a similar one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import metrics


def most_frequent_report(train_reports: Sequence[str]) -> str:
    """The report that occurs most often among the training reports, by its words; the first one in a tie."""
    counts = Counter(tuple(metrics.words(report)) for report in train_reports)
    if not counts:
        raise UserError("The training split has no reports, so there is no most frequent one.")
    favorite = counts.most_common(1)[0][0]
    return next(report for report in train_reports if tuple(metrics.words(report)) == favorite)


def nearest_neighbors(train_features: np.ndarray, test_features: np.ndarray) -> np.ndarray:
    """For each test image the row of the most similar training image: cosine of features `(n, C)`."""

    def unit(features: np.ndarray) -> np.ndarray:
        features = np.asarray(features, float)
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    return (unit(test_features) @ unit(train_features).T).argmax(1)


def other_patient(patients: Sequence, seed: int = 0) -> np.ndarray:
    """A permutation `(n,)` that gives every study another patient's study; each is used exactly once.

    Patients are put in random order, studies of one patient side by side; a rotation by the longest patient's
    number of studies then leaves no one with their own. Raises UserError where one patient has over half.
    """
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    longest = np.bincount(index).max()
    if 2 * longest > len(index):
        raise UserError("One patient has more than half of the evaluated studies; evaluate more patients.")
    order = np.argsort(np.random.default_rng(seed).permutation(index.max() + 1)[index], kind="stable")
    shuffled = np.empty(len(index), int)
    shuffled[order] = np.roll(order, -longest)
    return shuffled


def most_frequent_answers(train_questions: pd.DataFrame, questions: pd.DataFrame) -> np.ndarray:
    """Per question the commoner training answer about its label, boolean (yes); "no" where labels tie."""
    share = (train_questions["answer"] == "yes").groupby(train_questions["label"]).mean()
    return (questions["label"].map(share).fillna(0) > 0.5).to_numpy()
