"""Does a model say a finding because it sees it? Two experiments on phantoms, where the answer is exact.

*Counterfactual*: a film is drawn again without one finding, all else alike down to the grain. The finding should leave
the report and the others should stay. *Occlusion*: the place where the evidence for a finding peaks is hidden. The
finding's logit should fall more than when a patch of equal size is hidden elsewhere (Petsiuk et al. 2018, RISE, arXiv
1806.07421, for the idea of deleting what an explanation points at).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.images import enlarge
from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.evaluation.bootstrap import bootstrap_weights, records
from lightmedvlm_utils.observations import FINDINGS, LABELS, OPACITIES
from lightmedvlm_utils.phantom.images import render
from lightmedvlm_utils.phantom.patients import Study, without_finding

PATCH = 1 / 8  # side of the hidden square, as a share of the film's
_RATES = ("leaves", "others_stay", "wins")
_DERIVED = ("Lung Opacity", "No Finding")  # labels that follow from the others, so that they may change with them


class Reader(Protocol):
    """What is put to the test: an `inference.Reporter` whose connector has a disease head and attention maps."""

    def report(self, images: Sequence) -> list[str]: ...
    def findings(self, images: Sequence) -> np.ndarray: ...
    def attention(self, image: np.ndarray) -> dict[str, np.ndarray]: ...


def frontal_film(study: Study, size: int) -> np.ndarray:
    """(size, size) gray in 0 to 1: the study's frontal film, without the loss of a JPEG."""
    view = next(view for view in study.views if view.position != "LATERAL")
    return render(study, view, size)[0].astype(np.float32) / 255


def counterfactual_table(reader: Reader, studies: Sequence[Study], size: int) -> pd.DataFrame:
    """One row for each definite finding that a report names rightly: does it leave the report when it leaves the film?

    Columns: subject_id, study_id, label; `leaves`; `others_stay`: the share of the other labels named before that are
    still named (those left out that follow from the removed one; NaN without any); `before` and `after`, the finding's
    probability by the connector alone.
    """
    films = [frontal_film(study, size) for study in studies]
    said = _named(reader.report(films))
    removals = [
        (i, label)
        for i, study in enumerate(studies)
        for label in FINDINGS
        if said[i, LABELS.index(label)] and any(f.label == label and f.state == 1 for f in study.findings)
    ]
    without = [frontal_film(without_finding(studies[i], label), size) for i, label in removals]
    said_without = _named(reader.report(without)) if without else said[:0]
    before, after = (reader.findings(shown) if without else said[:0] for shown in (films, without))
    rows = []
    for row, (i, label) in enumerate(removals):
        column = LABELS.index(label)
        kept = [c for c in np.flatnonzero(said[i]) if c != column and not _follows(LABELS[c], label)]
        rows.append(
            {
                "subject_id": studies[i].subject_id,
                "study_id": studies[i].study_id,
                "label": label,
                "leaves": float(not said_without[row, column]),
                "others_stay": float(said_without[row, kept].mean()) if kept else np.nan,
                "before": float(before[i, column]),
                "after": float(after[row, column]),
            }
        )
    return pd.DataFrame(rows, columns=["subject_id", "study_id", "label", "leaves", "others_stay", "before", "after"])


def occlusion_table(
    reader: Reader, films: Sequence[np.ndarray], patients: Sequence[int], seed: int = 0
) -> pd.DataFrame:
    """One row for each finding that the connector takes for present: how far its logit falls when a square is hidden.

    Columns: subject_id, film, label; `own`: at the peak of its map; `shifted`: beside it, two sides of the square away;
    `random`: anywhere else. `wins` says that the first is larger than both others.
    """
    rng = np.random.default_rng(seed)
    probability = reader.findings(films)
    rows, hidden = [], []
    for i, film in enumerate(films):
        maps = reader.attention(film)
        for label in FINDINGS:
            if probability[i, LABELS.index(label)] <= 0.5:
                continue
            row, column = np.unravel_index(enlarge(maps[label], film.shape).argmax(), film.shape)
            peak = int(row), int(column)
            for place in (peak, _shifted(peak, film.shape), _anywhere(peak, film.shape, rng)):
                hidden.append(hide(film, place))
            rows.append({"subject_id": patients[i], "film": i, "label": label})
    table = pd.DataFrame(rows, columns=["subject_id", "film", "label"])
    if table.empty:
        return table.assign(own=[], shifted=[], random=[], wins=[])
    after = _logit(reader.findings(hidden)).reshape(len(rows), 3, len(LABELS))
    columns = [LABELS.index(label) for label in table["label"]]
    before = _logit(probability)[table["film"], columns]  # (rows,)
    falls = before[:, None] - after[np.arange(len(rows)), :, columns]  # (rows, 3)
    table[["own", "shifted", "random"]] = falls
    return table.assign(wins=(falls[:, 0] > falls[:, 1:].max(1)).astype(float))


def experiments(reader: Reader, studies: Sequence[Study], size: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Both tables for these studies' frontal films of `size` pixels, by the experiment's name."""
    films, patients = [frontal_film(study, size) for study in studies], [study.subject_id for study in studies]
    return {
        "counterfactual": counterfactual_table(reader, studies, size),
        "occlusion": occlusion_table(reader, films, patients, seed),
    }


def cause_records(tables: Mapping[str, pd.DataFrame], system: str, samples: int, seed: int) -> list[dict]:
    """Records of `experiments`: "counterfactual_leaves", "counterfactual_others_stay", "occlusion_wins"."""
    rows = []
    for name, table in tables.items():
        for metric in [metric for metric in _RATES if metric in table]:
            part = table[table[metric].notna()]
            if len(part):
                weights = bootstrap_weights(part["subject_id"], samples, seed)
                draws = weights @ part[metric].to_numpy(float) / weights.sum(1)
                about = {"system": system, "task": "localization", "section": "all findings"}
                rows += records({f"{name}_{metric}": draws}, n=len(part), unit="finding in image", **about)
    return rows


def hide(film: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """The film with a square around `place` (row, column) replaced by the mean of its rim: nothing to see, no hole."""
    half = max(1, round(PATCH * film.shape[0] / 2))
    rows = slice(max(0, place[0] - half), place[0] + half)
    columns = slice(max(0, place[1] - half), place[1] + half)
    square = film[rows, columns]
    rim = np.concatenate([square[0], square[-1], square[:, 0], square[:, -1]])
    covered = film.copy()
    covered[rows, columns] = rim.mean()
    return covered


def _named(reports: Sequence[str]) -> np.ndarray:
    """(n, 14) bool: the labels that reports assert."""
    return label_reports(list(reports))[list(LABELS)].to_numpy(float) == 1


def _follows(label: str, removed: str) -> bool:
    return label in _DERIVED and (label != "Lung Opacity" or removed in OPACITIES)


def _logit(probability: np.ndarray) -> np.ndarray:
    p = np.clip(probability, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def _shifted(peak: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    """Two sides of the square away, towards the middle of the film."""
    step = round(2 * PATCH * shape[1])
    return peak[0], peak[1] + step if peak[1] < shape[1] / 2 else peak[1] - step


def _anywhere(peak: tuple[int, int], shape: tuple[int, ...], rng: np.random.Generator) -> tuple[int, int]:
    """A place whose square does not touch the peak's."""
    side = PATCH * shape[0]
    while True:
        place = int(rng.integers(shape[0])), int(rng.integers(shape[1]))
        if max(abs(place[0] - peak[0]), abs(place[1] - peak[1])) > side:
            return place
