"""Answers to published VQA data sets, measured as their tables are: open, closed and overall accuracy, and token F1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lightmedvlm_utils.evaluation.bootstrap import bootstrap_weights, records
from lightmedvlm_utils.evaluation.metrics import Draws

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def answer_words(answer: str) -> list[str]:
    """Lower-case words without punctuation and articles: two answers of the same words are the same answer."""
    return re.findall(r"\w+", _ARTICLES.sub(" ", answer.lower()))


def token_f1(truth: str, answer: str) -> float:
    """F1 of the words that two answers share, each as often as both have it; 1 where neither has any."""
    expected, given = Counter(answer_words(truth)), Counter(answer_words(answer))
    total = expected.total() + given.total()
    return 2 * (expected & given).total() / total if total else 1.0


def published_records(
    questions: pd.DataFrame, answers: Sequence[str], *, system: str, protocol: str, samples: int = 1000, seed: int = 0
) -> list[dict]:
    """Records of one system's answers to `questions` (answer, closed, kind, subject_id): exact match of the words
    (`accuracy`) and `token_f1`, of the closed ones, the open ones, all and each kind."""
    pairs = list(zip(questions["answer"], answers, strict=True))
    exact = np.array([sorted(answer_words(a)) == sorted(answer_words(b)) for a, b in pairs], float)
    overlap = np.array([token_f1(a, b) for a, b in pairs])
    weights = bootstrap_weights(questions["subject_id"], samples, seed)
    closed, kind = questions["closed"].to_numpy(bool), questions["kind"].to_numpy()
    sections = {"all questions": np.ones(len(questions), bool), "closed questions": closed, "open questions": ~closed}
    sections |= {name: kind == name for name in dict.fromkeys(kind)}
    rows = []
    for section, chosen in sections.items():
        if chosen.any():
            own = weights[:, chosen]
            own = own[own.sum(1) > 0]  # a resample of patients may have no such question
            draws: Draws = {
                "accuracy": own @ exact[chosen] / own.sum(1),
                "token_f1": own @ overlap[chosen] / own.sum(1),
            }
            about: dict[str, Any] = {"task": "vqa_published", "unit": "question", "n": int(chosen.sum())}
            rows += records(draws, system=system, protocol=protocol, section=section, **about)
    return rows
