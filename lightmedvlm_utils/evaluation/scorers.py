"""Scorers turn predictions into tidy records, every system on the same studies.

With the same bootstrap weights for all, differences between systems are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.evaluation.bootstrap import PROTOCOL, Estimate, bootstrap_weights, records
from lightmedvlm_utils.observations import LABELS


class ReportScorer:
    """Scores generated reports of the same studies, system by system.

    `references` are whole cleaned reports; `patients` decides what the bootstrap resamples together. Labels
    of both sides come from the same rule-based labeler.
    """

    def __init__(
        self,
        references: Sequence[str],
        patients: Sequence,
        samples: int = 1000,
        seed: int = 0,
        section: str = "findings+impression",
        meteor: bool = False,
    ):
        self.references, self.section, self.meteor = list(references), section, meteor
        self.weights = bootstrap_weights(patients, samples, seed)
        self.labels = label_reports(self.references)
        self._draws: dict[tuple[str, ...], dict[str, metrics.Draws]] = {}

    def draws(self, reports: Sequence[str]) -> dict[str, metrics.Draws]:
        """Bootstrap draws of every metric, `{protocol: {metric: (1 + samples,)}}`; computed once per system."""
        key = tuple(reports)
        if key not in self._draws:
            self._draws[key] = self._compute_draws(reports)
        return self._draws[key]

    def _compute_draws(self, reports: Sequence[str]) -> dict[str, metrics.Draws]:
        predicted = label_reports(reports)
        chosen = (*metrics.REPORT_METRICS, *((metrics.meteor_draws,) if self.meteor else ()))
        lexical: metrics.Draws = {}
        for draws in chosen:
            lexical |= draws(self.references, reports, self.weights)
        labelled = {
            f"{PROTOCOL}_uncertain_{rule}": metrics.label_draws(self.labels, predicted, self.weights, rule)
            for rule in ("positive", "negative")
        }
        return {PROTOCOL: lexical} | labelled

    def records(self, system: str, reports: Sequence[str], per_label: bool = False) -> list[dict]:
        """Records of one system; with `per_label` also F1 by label, the label standing as the section."""
        rows = []
        for protocol, draws in self.draws(reports).items():
            rows += self._rows(draws, system, protocol)
        rows += self._rows({"distinct_ratio": Estimate(metrics.distinct_ratio(reports))}, system)
        if per_label:
            scores = metrics.per_label_draws(self.labels, label_reports(reports), self.weights)
            for label, label_draws in scores.items():
                rows += self._rows({"label_f1": label_draws}, system, f"{PROTOCOL}_uncertain_positive", label)
        return rows

    def reference_records(self) -> list[dict]:
        """Length and variety of the references themselves, to hold the generated ones against."""
        scores = self.draws(self.references)[PROTOCOL]
        own: dict[str, np.ndarray | Estimate] = {"mean_words": scores["mean_words"]}
        own["distinct_ratio"] = Estimate(metrics.distinct_ratio(self.references))
        return self._rows(own, "reference")

    def difference(self, name: str, first: Sequence[str], second: Sequence[str]) -> list[dict]:
        """Paired differences first - second, recorded as system `name`: resolved where 0 lies outside."""
        rows, other = [], self.draws(second)
        for protocol, draws in self.draws(first).items():
            gaps = {metric: values - other[protocol][metric] for metric, values in draws.items()}
            rows += self._rows(gaps, name, protocol)
        return rows

    def _rows(self, scores, system: str, protocol: str = PROTOCOL, section: str = "") -> list[dict]:
        about: dict[str, Any] = {"task": "report", "unit": "study", "n": len(self.references), "protocol": protocol}
        return records(scores, system=system, section=section or self.section, **about)


class VQAScorer:
    """Scores answers to the same questions, system by system.

    `questions` are those of `build_questions` with `subject_id`. An answer is a word of `questions.ANSWERS`, "yes" or
    "no"; "" where it could not be resolved. Records of yes/no questions have the task "vqa", those of open ones
    "vqa_open"; the section says which of them: all, a kind, a label, the negated ones.
    """

    def __init__(self, questions: pd.DataFrame, samples: int = 1000, seed: int = 0):
        self.questions = questions.reset_index(drop=True)
        self.closed = self.questions["closed"].to_numpy(bool)
        self.truth = (self.questions["answer"] == "yes").to_numpy()
        self.weights = bootstrap_weights(self.questions["subject_id"], samples, seed)

    def records(
        self,
        system: str,
        answers: Sequence[str],
        probability: Sequence[float] | None = None,
        threshold: float | None = None,
        per_label: bool = False,
    ) -> list[dict]:
        """Records of one system. `probability` of "yes" adds AUROC and calibration of the yes/no questions; with a
        `threshold` chosen on the validation split, `tuned_balanced_accuracy` stands beside the one at 0.5."""
        rows = []
        for section, chosen in self._sections(per_label).items():
            rows += self._rows(self._draws(answers, probability, threshold, chosen), system, section, chosen)
        return rows

    def difference(self, name: str, first: tuple, second: tuple) -> list[dict]:
        """Paired differences of two systems' arguments `(answers, probability, threshold)`, those that both have the
        metrics of, recorded as system `name`."""
        rows = []
        sections = self._sections()
        for section in [name for name in ("all questions", "open questions") if name in sections]:
            chosen = sections[section]
            one, other = (self._draws(*self._padded(system), chosen) for system in (first, second))
            gaps = {metric: one[metric] - other[metric] for metric in one if metric in other}
            rows += self._rows(gaps, name, section, chosen)
        return rows

    def flips(self, system: str, again: Sequence[str], answers: Sequence[str], section: str) -> list[dict]:
        """Share of the yes/no questions answered otherwise when asked `again` in other words."""
        chosen = self.closed
        flipped = (np.asarray(again) != np.asarray(answers))[chosen]
        weights = self.weights[:, chosen]
        draws = {"flip_rate": weights @ flipped / weights.sum(1)}
        return self._rows(draws, system, section, chosen)

    @staticmethod
    def _padded(system: tuple) -> tuple:
        return (*system, None, None)[:3]

    def _sections(self, per_label: bool = False) -> dict[str, np.ndarray]:
        """Boolean masks of the questions in each section; only sections that have questions."""
        kind, label = self.questions["kind"].to_numpy(), self.questions["label"].to_numpy()
        sections = {"all questions": self.closed, "open questions": ~self.closed}
        for name in dict.fromkeys(kind):
            sections |= {name: self.closed & (kind == name), f"{name}, open": ~self.closed & (kind == name)}
        sections["negated"] = self.closed & self.questions["negated"].to_numpy(bool)
        if per_label:
            by_label = np.isin(kind, ("presence", "normality"))
            sections |= {name: by_label & (label == name) for name in LABELS}
        return {name: mask for name, mask in sections.items() if mask.any()}

    def _draws(self, answers, probability, threshold, chosen: np.ndarray) -> metrics.Draws:
        weights, given = self.weights[:, chosen], np.asarray(answers)[chosen]
        if not self.closed[chosen].all():
            return metrics.open_draws(self.questions["answer"].to_numpy()[chosen], given, weights)
        truth = self.truth[chosen]
        draws = metrics.vqa_draws(truth, given == "yes", weights)
        if probability is not None:
            chance = np.asarray(probability, float)[chosen]
            draws |= metrics.probability_draws(truth, chance, weights)
            if threshold is not None:
                tuned = metrics.vqa_draws(truth, chance >= threshold, weights)
                draws["tuned_balanced_accuracy"] = tuned["balanced_accuracy"]
        return draws

    def _rows(self, scores, system: str, section: str, chosen: np.ndarray) -> list[dict]:
        task = "vqa" if self.closed[chosen].all() else "vqa_open"
        about: dict[str, Any] = {"task": task, "unit": "question", "n": int(chosen.sum())}
        return records(scores, system=system, section=section.removesuffix(", open"), **about)


def finding_records(
    system: str, states: pd.DataFrame, probability: np.ndarray, patients: Sequence, samples: int = 1000, seed: int = 0
) -> list[dict]:
    """AUROC of per-label probabilities `(n, 14)` against label states, each label and their mean.

    What the image part knows before any word is written: uncertain states are left out, label by label. Labels
    that are present in none or all of the studies have no AUROC and are not part of the mean.
    """
    weights = bootstrap_weights(patients, samples, seed)
    about = {"system": system, "task": "findings", "unit": "study"}
    rows, scores = [], []
    for column, label in enumerate(LABELS):
        known = (states[label] != -1).to_numpy()
        truth = (states[label] == 1).to_numpy()[known]
        if truth.any() and not truth.all():
            draws = metrics.probability_draws(truth, probability[known, column], weights[:, known])
            scores.append(draws["auroc"])
            rows += records({"auroc": draws["auroc"]}, section=label, n=int(known.sum()), **about)
    if scores:
        macro = {"macro_auroc": np.ma.masked_invalid(scores).mean(0).filled(np.nan)}
        rows += records(macro, section="all labels", n=len(states), **about)
    return rows
