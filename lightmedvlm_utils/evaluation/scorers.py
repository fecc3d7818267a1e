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
from lightmedvlm_utils.evaluation.bootstrap import (
    PROTOCOL,
    Estimate,
    bootstrap_weights,
    difference_records,
    records,
)
from lightmedvlm_utils.evaluation.clinical import Models, check_clinical, clinical_draws
from lightmedvlm_utils.evaluation.facts import fact_draws
from lightmedvlm_utils.evaluation.protocols import WHOLE, Comparison, R2Gen, Style, Where, study_comparisons
from lightmedvlm_utils.observations import LABELS

# What every system's reports are measured by: functions of references, hypotheses and bootstrap weights.
REPORT_METRICS: tuple[Callable[[Sequence[str], Sequence[str], np.ndarray], metrics.Draws], ...] = (
    metrics.lexical_draws,
    fact_draws,
)
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

    `clinical` names metrics of `clinical.py`, `clinical_models` says where their models lie, `dataset` what the
    reports are of. A metric that cannot run is missing in the records and listed in `refused`, name -> why.
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
        clinical: Sequence[str] = (),
        clinical_models: Models | None = None,
        dataset: str = "",
    ):
        check_clinical(clinical, clinical_models)
        self.clinical, self.clinical_models, self.dataset = list(clinical), clinical_models, dataset
        self.refused: dict[str, str] = {}
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
            self._draws[key] = found | self._clinical_draws(key)
        return self._draws[key]

    def _clinical_draws(self, reports: Sequence[str]) -> dict[Where, metrics.Draws]:
        names = [name for name in self.clinical if name not in self.refused]
        found, refused = clinical_draws(
            names, self.references, reports, self.weights, self.clinical_models, self.dataset
        )
        self.refused |= refused
        return {self.whole._replace(protocol=protocol): draws for protocol, draws in found.items()}

    def _checked(self, reports: Sequence[str]) -> tuple[str, ...]:
        if len(reports) != len(self.references):
            raise UserError(f"There are {len(self.references)} references but {len(reports)} reports; give as many.")
        return tuple(reports)

    def _compute_draws(self, comparison: Comparison, reports: Sequence[str]) -> dict[Where, metrics.Draws]:
        where, hypotheses, weights = comparison.where, comparison.hypotheses(reports), self._weights(comparison)
        pair = comparison.references, hypotheses, weights
        if where == self.whole:
            scores: metrics.Draws = {}
            for draws in REPORT_METRICS:
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
            both = draws.keys() & other.get(where, {}).keys()  # not a clinical metric that one of them has not
            gaps = {metric: values - other[where][metric] for metric, values in draws.items() if metric in both}
            rows += difference_records(gaps, system=name, task="report", **where._asdict())
        return rows


def _rows(scores: Mapping[str, np.ndarray | Estimate], system: str, where: Where) -> list[dict]:
    return records(scores, system=system, task="report", **where._asdict())


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
            rows += self._rows(self._draws(chosen, answers, probability, threshold), system, section, chosen)
        return rows

    def difference(self, name: str, first: tuple, second: tuple) -> list[dict]:
        """Paired differences of two systems' arguments `(answers, probability, threshold)`, those that both have the
        metrics of, recorded as system `name`."""
        rows = []
        sections = self._sections()
        for section in [name for name in ("all questions", "open questions") if name in sections]:
            chosen = sections[section]
            one, other = (self._draws(chosen, *system) for system in (first, second))
            gaps = {metric: one[metric] - other[metric] for metric in one if metric in other}
            rows += difference_records(gaps, **self._about(name, section, chosen))
        return rows

    def draws(self, section: str, answers: Sequence[str], probability: Sequence[float] | None = None) -> metrics.Draws:
        """Bootstrap draws of one section's metrics; empty where no question belongs to it."""
        chosen = self._sections().get(section)
        return {} if chosen is None else self._draws(chosen, answers, probability)

    def flips(self, system: str, again: Sequence[str], answers: Sequence[str], section: str) -> list[dict]:
        """Share of the yes/no questions answered otherwise when asked `again` in other words."""
        chosen = self.closed
        flipped = (np.asarray(again) != np.asarray(answers))[chosen]
        weights = self.weights[:, chosen]
        draws = {"flip_rate": weights @ flipped / weights.sum(1)}
        return self._rows(draws, system, section, chosen)

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

    def _draws(self, chosen: np.ndarray, answers, probability=None, threshold=None) -> metrics.Draws:
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
        return records(scores, **self._about(system, section, chosen))

    def _about(self, system: str, section: str, chosen: np.ndarray) -> dict[str, Any]:
        task = "vqa" if self.closed[chosen].all() else "vqa_open"
        about = {"system": system, "task": task, "section": section.removesuffix(", open")}
        return about | {"unit": "question", "n": int(chosen.sum())}


def finding_draws(states: pd.DataFrame, probability: np.ndarray, weights: np.ndarray) -> metrics.Draws:
    """AUROC of per-label probabilities `(n, 14)` against label states by label, and their mean as "all labels".

    Uncertain states are left out, label by label. Labels that are present in none or all of the studies have no AUROC
    and are not part of the mean; with none of the others there is nothing.
    """
    found: metrics.Draws = {}
    for column, label in enumerate(LABELS):
        known = (states[label] != -1).to_numpy()
        truth = (states[label] == 1).to_numpy()[known]
        if truth.any() and not truth.all():
            found[label] = metrics.probability_draws(truth, probability[known, column], weights[:, known])["auroc"]
    if found:
        found["all labels"] = np.ma.masked_invalid(list(found.values())).mean(0).filled(np.nan)
    return found


def finding_records(
    system: str, states: pd.DataFrame, probability: np.ndarray, patients: Sequence, samples: int = 1000, seed: int = 0
) -> list[dict]:
    """Records of `finding_draws`: what the image part knows before any word is written."""
    rows = []
    for section, draws in finding_draws(states, probability, bootstrap_weights(patients, samples, seed)).items():
        metric = "macro_auroc" if section == "all labels" else "auroc"
        n = len(states) if section == "all labels" else int((states[section] != -1).sum())
        rows += records({metric: draws}, system=system, task="findings", unit="study", section=section, n=n)
    return rows
