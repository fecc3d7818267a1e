"""Scorers turn predictions into tidy records, every system on the same studies.

With the same bootstrap weights for all, differences between systems are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.evaluation.bootstrap import PROTOCOL, Estimate, bootstrap_weights, records
from lightmedvlm_utils.evaluation.protocols import WHOLE, Comparison, R2Gen, Style, Where, study_comparisons
from lightmedvlm_utils.observations import LABELS

RULES: tuple[metrics.UncertainAs, ...] = ("positive", "negative")  # what an uncertain mention counts as


def label_counts(references: Sequence[str], hypotheses: Sequence[str]) -> pd.DataFrame:
    """Each study's true and false positives and false negatives of the rule-based labeler's 14 labels."""
    return metrics.label_counts(label_reports(references), label_reports(hypotheses))


# What `ReportScorer.per_study` puts side by side: functions of references and hypotheses that return one row a study.
PER_STUDY: tuple[Callable[[Sequence[str], Sequence[str]], pd.DataFrame], ...] = (
    metrics.lexical_per_study,
    label_counts,
)


class ReportScorer:
    """Scores generated reports of the same studies, system by system, in the protocols of `protocols.py`.

    `references` are whole cleaned reports; `patients` decides what the bootstrap resamples together. Labels
    of both sides come from the same rule-based labeler. Protocol "r2gen" is recorded with an `r2gen_style`, by the data
    set; it needs `train_reports` (its vocabulary) and, for "mimic", `images` (their number in each study).
    """

    def __init__(
        self,
        references: Sequence[str],
        patients: Sequence,
        samples: int = 1000,
        seed: int = 0,
        section: str = WHOLE,
        meteor: bool = False,
        study_ids: Sequence | None = None,
        images: Sequence[int] | None = None,
        train_reports: Sequence[str] | None = None,
        r2gen_style: Style | None = None,
    ):
        self.references, self.section, self.meteor = list(references), section, meteor
        self.study_ids = range(len(self.references)) if study_ids is None else study_ids
        self.patients, self.weights = np.asarray(patients), bootstrap_weights(patients, samples, seed)
        for name, values in (("patients", self.patients), ("study_ids", self.study_ids)):
            if len(values) != len(self.references):
                raise UserError(f"There are {len(self.references)} references but {len(values)} {name}; give as many.")
        self.r2gen = None
        self.comparisons = study_comparisons(self.references, section)
        if r2gen_style is not None:
            if train_reports is None:
                raise UserError("Protocol r2gen needs `train_reports`: its vocabulary is made of them.")
            self.r2gen = R2Gen(r2gen_style, train_reports)
            self.comparisons.append(self.r2gen.comparison(self.references, images))
        # Labels are read in protocol "study" alone: another's words are not the text that was written.
        texts = {c.where: c.references for c in self.comparisons if c.where.protocol == PROTOCOL}
        self._labels = {where: label_reports(references) for where, references in texts.items()}
        self.labels = self._labels[self.whole]
        self._draws: dict[tuple[str, ...], dict[Where, metrics.Draws]] = {}

    @property
    def whole(self) -> Where:
        """Whole reports in protocol "study"."""
        return self.comparisons[0].where

    def draws(self, reports: Sequence[str]) -> dict[Where, metrics.Draws]:
        """Bootstrap draws of every metric, by protocol and section; computed once per system."""
        key = self._checked(reports)
        if key not in self._draws:
            found: dict[Where, metrics.Draws] = {}
            for comparison in self.comparisons:
                found |= self._compute_draws(comparison, key)
            self._draws[key] = found
        return self._draws[key]

    def _checked(self, reports: Sequence[str]) -> tuple[str, ...]:
        if len(reports) != len(self.references):
            raise UserError(f"There are {len(self.references)} references but {len(reports)} reports; give as many.")
        return tuple(reports)

    def _compute_draws(self, comparison: Comparison, reports: Sequence[str]) -> dict[Where, metrics.Draws]:
        where, hypotheses, weights = comparison.where, comparison.hypotheses(reports), self._weights(comparison)
        pair = comparison.references, hypotheses, weights
        if where == self.whole:
            scores: metrics.Draws = {}
            for draws in metrics.REPORT_METRICS:
                scores |= draws(*pair)
        else:
            scores = metrics.lexical_draws(*pair, comparison.tokenize)
        if self.meteor:
            scores |= metrics.meteor_draws(*pair, comparison.tokenize, corpus=where.protocol != PROTOCOL)
        found = {where: scores}
        if where in self._labels:
            predicted = label_reports(hypotheses)
            for rule in RULES:
                named = where._replace(protocol=f"{PROTOCOL}_uncertain_{rule}")
                found[named] = metrics.label_draws(self._labels[where], predicted, weights, rule)
        return found

    def _weights(self, comparison: Comparison) -> np.ndarray:
        if comparison.where == self.whole:
            return self.weights
        weights = self.weights[:, comparison.rows]
        return weights[weights.sum(1) > 0]  # a resample of patients may hold no study with the section

    def records(self, system: str, reports: Sequence[str], per_label: bool = False) -> list[dict]:
        """Records of one system; with `per_label` also F1 by label, the label standing as the section."""
        rows = []
        for where, draws in self.draws(reports).items():
            rows += _rows(draws, system, where)
        rows += _rows({"distinct_ratio": Estimate(metrics.distinct_ratio(reports))}, system, self.whole)
        if per_label:
            scores = metrics.per_label_draws(self.labels, label_reports(reports), self.weights)
            for label, label_draws in scores.items():
                where = self.whole._replace(protocol=f"{PROTOCOL}_uncertain_positive", section=label)
                rows += _rows({"label_f1": label_draws}, system, where)
        return rows

    def per_study(self, system: str, reports: Sequence[str]) -> pd.DataFrame:
        """One row a study, without any text: subject_id, study_id, system and the scores of `PER_STUDY`, on whole
        reports in protocol "study"; what figures, tests and a look at the worst studies start from."""
        about = pd.DataFrame({"subject_id": self.patients, "study_id": list(self.study_ids), "system": system})
        scores = [function(self.references, self._checked(reports)) for function in PER_STUDY]
        return pd.concat([about, *(table.reset_index(drop=True) for table in scores)], axis=1)

    def reference_records(self) -> list[dict]:
        """Length and variety of the references themselves, to hold the generated ones against; in protocol "r2gen"
        also what it takes off them."""
        rows = _rows({"distinct_ratio": Estimate(metrics.distinct_ratio(self.references))}, "reference", self.whole)
        for comparison in self.comparisons:
            weights = self._weights(comparison)
            own = metrics.length_draws(comparison.references, weights, comparison.tokenize)
            if self.r2gen is not None and comparison.where.protocol != PROTOCOL:
                own |= self.r2gen.clipping_draws([self.references[row] for row in comparison.rows], weights)
            rows += _rows(own, "reference", comparison.where)
        return rows

    def difference(self, name: str, first: Sequence[str], second: Sequence[str]) -> list[dict]:
        """Paired differences first - second, recorded as system `name`: resolved where 0 lies outside."""
        rows, other = [], self.draws(second)
        for where, draws in self.draws(first).items():
            gaps = {metric: values - other[where][metric] for metric, values in draws.items()}
            rows += _rows(gaps, name, where)
        return rows


def _rows(scores: Mapping[str, np.ndarray | Estimate], system: str, where: Where) -> list[dict]:
    return records(scores, system=system, task="report", **where._asdict())


class VQAScorer:
    """Scores yes/no answers to the same questions, system by system.

    `questions` has the columns `label`, `answer` ("yes" or "no") and `subject_id`.
    """

    def __init__(self, questions: pd.DataFrame, samples: int = 1000, seed: int = 0):
        self.questions = questions.reset_index(drop=True)
        self.truth = (self.questions["answer"] == "yes").to_numpy()
        self.weights = bootstrap_weights(self.questions["subject_id"], samples, seed)

    def draws(self, yes: Sequence[bool], probability: Sequence[float] | None = None) -> metrics.Draws:
        """Bootstrap draws of every metric; those of the probability only where one is given."""
        draws = metrics.vqa_draws(self.truth, yes, self.weights)
        if probability is not None:
            draws |= metrics.probability_draws(self.truth, probability, self.weights)
        return draws

    def records(
        self,
        system: str,
        yes: Sequence[bool],
        probability: Sequence[float] | None = None,
        per_label: bool = False,
    ) -> list[dict]:
        """Records of one system; with `per_label` also balanced accuracy by label, as the section."""
        rows = self._rows(self.draws(yes, probability), system)
        for label in LABELS if per_label else ():
            asked = (self.questions["label"] == label).to_numpy()
            if asked.any():
                draws = metrics.vqa_draws(self.truth[asked], np.asarray(yes)[asked], self.weights[:, asked])
                own = {"balanced_accuracy": draws["balanced_accuracy"]}
                rows += self._rows(own, system, label, int(asked.sum()))
        return rows

    def difference(self, name: str, first: tuple, second: tuple) -> list[dict]:
        """Paired differences of two systems' `(yes, probability)`, recorded as system `name`."""
        other = self.draws(*second)
        gaps = {metric: values - other[metric] for metric, values in self.draws(*first).items()}
        return self._rows(gaps, name)

    def _rows(self, scores, system: str, section: str = "all questions", n: int | None = None) -> list[dict]:
        about: dict[str, Any] = {"task": "vqa", "unit": "question", "n": n or len(self.truth)}
        return records(scores, system=system, section=section, **about)


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
