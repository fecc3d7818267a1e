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
from lightmedvlm_utils.evaluation.clinical import Models, check_clinical, clinical_draws
from lightmedvlm_utils.observations import LABELS


class ReportScorer:
    """Scores generated reports of the same studies, system by system.

    `references` are whole cleaned reports; `patients` decides what the bootstrap resamples together. Labels
    of both sides come from the same rule-based labeler.

    `clinical` names metrics of `clinical.py`, `clinical_models` says where their models lie, `dataset` what the
    reports are of. A metric that cannot run is missing in the records and listed in `refused`, name -> why.
    """

    def __init__(
        self,
        references: Sequence[str],
        patients: Sequence,
        samples: int = 1000,
        seed: int = 0,
        section: str = "findings+impression",
        meteor: bool = False,
        clinical: Sequence[str] = (),
        clinical_models: Models | None = None,
        dataset: str = "",
    ):
        check_clinical(clinical, clinical_models)
        self.clinical, self.clinical_models, self.dataset = list(clinical), clinical_models, dataset
        self.refused: dict[str, str] = {}
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
        return self._text_draws(reports) | self._clinical_draws(reports)

    def _clinical_draws(self, reports: Sequence[str]) -> dict[str, metrics.Draws]:
        names = [name for name in self.clinical if name not in self.refused]
        draws, refused = clinical_draws(
            names, self.references, reports, self.weights, self.clinical_models, self.dataset
        )
        self.refused |= refused
        return draws

    def _text_draws(self, reports: Sequence[str]) -> dict[str, metrics.Draws]:
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
        scores = self._text_draws(self.references)[PROTOCOL]
        own: dict[str, np.ndarray | Estimate] = {"mean_words": scores["mean_words"]}
        own["distinct_ratio"] = Estimate(metrics.distinct_ratio(self.references))
        return self._rows(own, "reference")

    def difference(self, name: str, first: Sequence[str], second: Sequence[str]) -> list[dict]:
        """Paired differences first - second, recorded as system `name`: resolved where 0 lies outside."""
        rows, other = [], self.draws(second)
        for protocol, draws in self.draws(first).items():
            both = draws.keys() & other.get(protocol, {}).keys()  # not a clinical metric that one of them has not
            gaps = {metric: values - other[protocol][metric] for metric, values in draws.items() if metric in both}
            rows += self._rows(gaps, name, protocol)
        return rows

    def _rows(self, scores, system: str, protocol: str = PROTOCOL, section: str = "") -> list[dict]:
        about: dict[str, Any] = {"task": "report", "unit": "study", "n": len(self.references), "protocol": protocol}
        return records(scores, system=system, section=section or self.section, **about)


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
