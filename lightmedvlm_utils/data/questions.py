"""Yes/no questions about the 14 labels, balanced so that a question does not betray its own answer.

For every label as many "yes" as "no": whoever ignores the image gets half of them right, whatever the label.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import CHILDREN, LABELS

QUESTIONS: dict[str, tuple[str, ...]] = {
    "Atelectasis": (
        "Is there atelectasis?",
        "Does the image show atelectasis?",
        "Is any part of the lung collapsed?",
    ),
    "Cardiomegaly": (
        "Is the heart enlarged?",
        "Is there cardiomegaly?",
        "Does the image show an enlarged cardiac silhouette?",
    ),
    "Consolidation": (
        "Is there consolidation?",
        "Does the image show a consolidation?",
        "Is any part of the lung consolidated?",
    ),
    "Edema": (
        "Is there pulmonary edema?",
        "Does the image show pulmonary edema?",
        "Are there signs of edema in the lungs?",
    ),
    "Enlarged Cardiomediastinum": (
        "Is the mediastinum widened?",
        "Is the cardiomediastinal silhouette enlarged?",
        "Does the image show an enlarged cardiomediastinum?",
    ),
    "Fracture": (
        "Is there a fracture?",
        "Does the image show a fracture?",
        "Is any bone broken?",
    ),
    "Lung Lesion": (
        "Is there a lung lesion?",
        "Does the image show a pulmonary nodule or mass?",
        "Is there a nodule or mass in the lungs?",
    ),
    "Lung Opacity": (
        "Is there a lung opacity?",
        "Does the image show an opacity in the lungs?",
        "Is any part of the lungs opacified?",
    ),
    "No Finding": (
        "Is the chest x-ray normal?",
        "Is this a normal study?",
        "Is the image free of any abnormal finding?",
    ),
    "Pleural Effusion": (
        "Is there a pleural effusion?",
        "Does the image show a pleural effusion?",
        "Is there fluid in the pleural space?",
    ),
    "Pleural Other": (
        "Is there pleural thickening or another pleural abnormality besides effusion?",
        "Does the image show pleural thickening, scarring or plaques?",
        "Is the pleura thickened?",
    ),
    "Pneumonia": (
        "Is there pneumonia?",
        "Does the image show pneumonia?",
        "Are there signs of pneumonia?",
    ),
    "Pneumothorax": (
        "Is there a pneumothorax?",
        "Does the image show a pneumothorax?",
        "Is there air in the pleural space?",
    ),
    "Support Devices": (
        "Is there a support device?",
        "Does the image show a tube, line or other medical device?",
        "Are any tubes, lines or devices in place?",
    ),
}

COLUMNS = ["study_id", "label", "question", "answer", "synthetic"]


def build_questions(studies: pd.DataFrame, per_study: int, seed: int, synthetic_minority: bool = False) -> pd.DataFrame:
    """Yes/no questions with their answers: DataFrame of study_id, label, question, answer, synthetic.

    `studies` holds study_id and the 14 label columns. "yes" is state 1; "no" is state 0 and, only as far as
    needed, a blank (not mentioned); uncertain states are never asked. On average at most `per_study`
    questions a study; where the budget binds, the most frequent labels give way first.

    `synthetic_minority` adds questions about the labels that have fewer than the others: their positive
    studies asked in other words, and as many new negative ones (the thesis' third stage). The result depends
    on the studies and on `seed`, not on the order of the rows. Raises UserError if a label column is missing.
    """
    missing = [label for label in LABELS if label not in studies]
    if missing:
        raise UserError(f"The study table has no column {', '.join(missing)}; run notebook 01 first.")
    studies = studies.drop_duplicates("study_id").sort_values("study_id", ignore_index=True)
    candidates = {label: _Candidates(studies, label, seed) for label in LABELS}
    pairs = {label: found.most_pairs for label, found in candidates.items()}
    level = _water_level(list(pairs.values()), per_study * len(studies) // 2)
    rows = []
    for label, found in candidates.items():
        natural = min(pairs[label], level)
        total = min(level, found.most_synthetic_pairs) if synthetic_minority else natural
        rows += found.ask(natural, total)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.sort_values(["study_id", "label", "question"], ignore_index=True)


def _water_level(pairs: list[int], budget: int) -> int:
    """The largest cap for which sum(min(pairs, cap)) stays within the budget, at most max(pairs)."""
    levels = np.arange(max(pairs) + 1)
    totals = np.minimum(np.array(pairs)[:, None], levels).sum(axis=0)
    return int(levels[totals <= budget][-1])


class _Candidates:
    """The studies that can be asked about one label, in a random order that the seed fixes."""

    def __init__(self, studies: pd.DataFrame, label: str, seed: int):
        self.label = label
        self.rng = np.random.default_rng([seed, LABELS.index(label)])
        ids, state = studies["study_id"].to_numpy(), studies[label].to_numpy(dtype=float)
        # A report that names a child speaks of the parent too, so the parent's blank is then no clear "no".
        children = studies[list(CHILDREN.get(label, ()))].to_numpy(dtype=float)
        blank = np.isnan(state) & ~(np.isin(children, (1, -1)).any(axis=1))
        self.yes = self.rng.permutation(ids[state == 1])
        explicit, unmentioned = ids[state == 0], ids[blank]
        self.no = np.concatenate([self.rng.permutation(explicit), self.rng.permutation(unmentioned)])
        self.first_wording = self.rng.integers(len(QUESTIONS[label]), size=len(ids))
        self.position = dict(zip(ids.tolist(), range(len(ids)), strict=True))

    @property
    def most_pairs(self) -> int:
        return min(len(self.yes), len(self.no))

    @property
    def most_synthetic_pairs(self) -> int:
        """Each positive study can be asked once in every wording; negatives are not repeated."""
        return min(len(self.yes) * len(QUESTIONS[self.label]), len(self.no))

    def ask(self, natural: int, total: int) -> list[tuple]:
        """`total` yes/no pairs, of which those after the first `natural` are synthetic."""
        rows = []
        for index in range(total):
            round_, position = divmod(index, max(len(self.yes), 1))
            rows.append(self._row(self.yes[position], "yes", round_, index >= natural))
            rows.append(self._row(self.no[index], "no", round_, index >= natural))
        return rows

    def _row(self, study_id, answer: str, round_: int, synthetic: bool) -> tuple:
        wordings = QUESTIONS[self.label]
        wording = wordings[(self.first_wording[self.position[int(study_id)]] + round_) % len(wordings)]
        return int(study_id), self.label, wording, answer, synthetic
