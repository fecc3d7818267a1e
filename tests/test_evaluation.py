"""Baselines, scorers and localization: what must hold whatever the model says."""

import numpy as np
import pandas as pd
import pytest

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import baselines, scorers
from lightmedvlm_utils.evaluation.localization import (
    center_map,
    enlarge,
    localization_records,
    localization_table,
    localize,
)
from lightmedvlm_utils.observations import LABELS

EFFUSION = "Findings: Small left pleural effusion. Impression: Pleural effusion."
CLEAR = "Findings: The lungs are clear. Impression: No acute disease."
EDEMA = "Findings: Moderate pulmonary edema. Impression: Edema."


def find(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row["value"]


def test_most_frequent_report_compares_words_not_bytes():
    reports = [CLEAR, EFFUSION, EFFUSION.lower(), EDEMA]
    assert baselines.most_frequent_report(reports) == EFFUSION
    with pytest.raises(UserError, match="training split"):
        baselines.most_frequent_report([])


def test_nearest_neighbor_ignores_the_scale_of_features():
    train = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert baselines.nearest_neighbors(train, [[0.1, 9.0], [5.0, 4.0]]).tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_no_study_keeps_its_own_patient(seed):
    rng = np.random.default_rng(seed)
    patients = np.concatenate([rng.integers(0, 12, 40), [99] * 10])
    other = baselines.other_patient(patients, seed)
    assert sorted(other) == list(range(50))
    assert (patients[other] != patients).all()


def test_one_dominant_patient_cannot_be_shuffled():
    assert sorted(baselines.other_patient([1, 1, 2, 2])) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="half"):
        baselines.other_patient([1, 1, 1, 2])


def test_most_frequent_answers_learn_per_label():
    train = pd.DataFrame({"label": ["Edema"] * 3 + ["Fracture"], "answer": ["yes", "yes", "no", "no"]})
    asked = pd.DataFrame({"label": ["Edema", "Fracture", "Pneumonia"]})
    assert baselines.most_frequent_answers(train, asked).tolist() == [True, False, False]


def test_report_scorer_ranks_right_above_wrong():
    references = [EFFUSION, CLEAR, EDEMA, EFFUSION]
    scorer = scorers.ReportScorer(references, patients=[1, 2, 3, 4], samples=50)
    right = scorer.records("right", references, per_label=True)
    wrong = scorer.records("wrong", [CLEAR, EFFUSION, CLEAR, CLEAR])
    protocol = "study_uncertain_positive"
    whole = {"section": "findings+impression", "protocol": protocol}
    assert find(right, metric="label_macro_f1", **whole) == 1
    assert find(wrong, metric="label_macro_f1", **whole) == 0
    assert find(right, metric="label_f1", section="Edema") == 1
    assert find(right, metric="label_f1", section="Fracture") is None
    assert find(right, metric="distinct_ratio") == 0.75
    assert {"mean_words", "distinct_ratio"} == {row["metric"] for row in scorer.reference_records()}


def test_differences_are_paired():
    references = [EFFUSION, CLEAR, EDEMA, EFFUSION]
    scorer = scorers.ReportScorer(references, patients=[1, 2, 3, 4], samples=50)
    for row in scorer.difference("same", references, references):
        assert row["value"] == row["low"] == row["high"] == 0


def test_vqa_scorer_counts_questions_and_resamples_patients():
    questions = pd.DataFrame(
        {
            "subject_id": [1, 1, 2, 2, 3, 3],
            "label": ["Edema", "Edema", "Fracture", "Fracture", "Edema", "Edema"],
            "answer": ["yes", "no"] * 3,
        }
    )
    scorer = scorers.VQAScorer(questions, samples=40)
    perfect = questions["answer"] == "yes"
    rows = scorer.records("perfect", perfect, perfect.astype(float), per_label=True)
    assert find(rows, metric="auroc") == 1
    assert find(rows, metric="balanced_accuracy", section="Edema") == 1
    assert {row["n"] for row in rows if row["section"] == "Fracture"} == {2}
    flipped = scorer.records("flipped", ~perfect)
    assert find(flipped, metric="mcc") == -1 and all(row["metric"] != "auroc" for row in flipped)


def test_finding_records_leave_out_uncertain_and_constant_labels():
    states = pd.DataFrame(0.0, index=range(6), columns=LABELS)
    states["Edema"] = [1, 1, 0, 0, -1, np.nan]
    probability = np.zeros((6, 14))
    probability[:, LABELS.index("Edema")] = [0.9, 0.8, 0.2, 0.1, 1.0, 0.3]
    rows = scorers.finding_records("sasa", states, probability, np.arange(6), samples=20)
    assert find(rows, metric="auroc", section="Edema", n=5) == 1
    assert find(rows, metric="macro_auroc") == 1 and len(rows) == 2


def test_localize_known_maps():
    mask = np.zeros((64, 64), bool)
    mask[:16, :16] = True
    corner = np.zeros((4, 4))
    corner[0, 0] = 1
    hit, inside = localize(corner, mask)
    assert hit and inside > 0.6
    assert localize(corner[::-1], mask)[0] is False
    assert localize(np.ones((4, 4)), mask)[1] == pytest.approx(mask.mean())
    assert localize(center_map(), ~mask)[0]
    with pytest.raises(ValueError, match="zero"):
        localize(np.zeros((4, 4)), mask)


def test_enlarging_keeps_place_and_range():
    map_ = np.random.default_rng(0).random((3, 5))
    large = enlarge(map_, (30, 50))
    assert large.shape == (30, 50) and large.min() >= map_.min() and large.max() <= map_.max()
    assert np.unravel_index(large.argmax(), large.shape)[0] // 10 == np.unravel_index(map_.argmax(), (3, 5))[0]


def test_localization_stands_beside_its_baselines():
    rng = np.random.default_rng(0)
    masks = [{"Edema": np.zeros((64, 64), bool)} for _ in range(6)]
    for mask in masks:
        row, column = rng.integers(0, 4, 2) * 16
        mask["Edema"][row : row + 16, column : column + 16] = True
    maps = [{"Edema": mask["Edema"].reshape(4, 16, 4, 16).mean((1, 3))} for mask in masks]
    patients = np.arange(6)
    table = localization_table(maps, masks, patients, baselines.other_patient(patients), "sasa")
    rows = localization_records(table, samples=20)
    pointing = {row["system"]: row["value"] for row in rows if row["metric"] == "pointing_game"}
    assert pointing["sasa"] == 1 and pointing["uniform"] == pytest.approx(1 / 16)
    assert set(pointing) == {"sasa", "shuffled_image", "center", "uniform"}
