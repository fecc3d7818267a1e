"""Baselines, scorers and localization: what must hold whatever the model says."""

import json

import numpy as np
import pandas as pd
import pytest

from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import baselines, bootstrap, metrics, published, runs, scorers
from lightmedvlm_utils.evaluation.localization import (
    center_map,
    enlarge,
    localization_records,
    localization_table,
    localize,
    mean_masks,
)
from lightmedvlm_utils.evaluation.systems import Systems
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


def questions_table(**columns) -> pd.DataFrame:
    """Questions of `build_questions`, as far as scorers and baselines read them."""
    frame = pd.DataFrame(columns)
    defaults = {"kind": "presence", "subject": frame["label"], "value": "", "negated": False, "closed": True}
    return frame.assign(**{name: value for name, value in defaults.items() if name not in frame})


def test_most_frequent_answers_learn_per_question():
    train = questions_table(label=["Edema"] * 3 + ["Fracture"] * 2, answer=["yes", "yes", "no", "no", "yes"])
    asked = questions_table(label=["Edema", "Fracture", "Pneumonia"])
    assert baselines.most_frequent_answers(train, asked) == ["yes", "no", "no"]


def test_text_only_answers_learn_what_the_words_betray():
    train = questions_table(
        label="Edema", question=["Is it wet?", "Is it dry?", "Where is it?"] * 4, answer=["yes", "no", "left"] * 4
    )
    train["closed"] = train["answer"] != "left"
    assert baselines.text_only_answers(train, train) == train["answer"].tolist()


def test_a_neighbor_answers_from_its_own_report():
    neighbors = pd.DataFrame({"study_id": [7, 8], "report": ["Findings: Small left pleural effusion.", "Clear lungs."]})
    neighbors[list(LABELS)] = label_reports(neighbors["report"])
    asked = questions_table(
        label=["Pleural Effusion"] * 4,
        kind=["presence", "side", "side", "presence"],
        value=["", "right", "", ""],
        negated=[False, False, False, True],
        closed=[True, True, False, True],
    )
    first = neighbors.iloc[[0] * 4].reset_index(drop=True)
    assert baselines.neighbor_answers(asked, first, ["?"] * 4) == ["yes", "no", "left", "no"]
    second = neighbors.iloc[[1] * 4].reset_index(drop=True)
    assert baselines.neighbor_answers(asked, second, ["?"] * 4) == ["no", "?", "?", "yes"]


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
        if row["metric"].endswith("_p"):
            assert row["value"] in (1, None)
        elif row["value"] is not None:
            assert row["value"] == row["low"] == row["high"] == 0


def test_vqa_scorer_counts_questions_and_resamples_patients():
    labels = ["Edema", "Edema", "Fracture", "Fracture", "Edema", "Edema"]
    questions = questions_table(subject_id=[1, 1, 2, 2, 3, 3], label=labels, answer=["yes", "no"] * 3)
    questions["negated"] = [True, True, False, False, False, False]
    scorer = scorers.VQAScorer(questions, samples=40)
    perfect = questions["answer"].tolist()
    chance = [float(answer == "yes") for answer in perfect]
    rows = scorer.records("perfect", perfect, chance, threshold=0.5, per_label=True)
    assert find(rows, metric="auroc", section="all questions") == 1
    assert find(rows, metric="tuned_balanced_accuracy", section="all questions") == 1
    assert find(rows, metric="balanced_accuracy", section="Edema") == 1
    assert {row["n"] for row in rows if row["section"] in ("Fracture", "negated")} == {2}
    wrong = [{"yes": "no", "no": "yes"}[answer] for answer in perfect]
    flipped = scorer.records("flipped", wrong)
    assert find(flipped, metric="mcc", section="all questions") == -1
    assert all(row["metric"] != "auroc" for row in flipped)
    assert find(scorer.flips("perfect", wrong, perfect, "held-out wordings"), metric="flip_rate") == 1
    gap = scorer.difference("gap", (perfect, chance), (wrong,))
    assert find(gap, metric="accuracy", section="all questions") == 1 and all(row["metric"] != "auroc" for row in gap)


def test_open_answers_have_their_own_task_and_unresolved_ones_are_wrong():
    questions = questions_table(
        subject_id=[1, 2, 3, 4], label="Edema", kind="side", answer=["left", "left", "right", "right"], closed=False
    )
    rows = scorers.VQAScorer(questions, samples=40).records("sasa", ["left", "", "left", "right"])
    assert {row["task"] for row in rows} == {"vqa_open"} and {row["section"] for row in rows} == {
        "open questions",
        "side",
    }
    assert find(rows, metric="accuracy", section="side") == 0.5
    assert find(rows, metric="unresolved", section="side") == 0.25
    constant = scorers.VQAScorer(questions, samples=40).records("constant", ["left"] * 4)
    assert find(constant, metric="macro_recall", section="side") == 0.5


def test_threshold_is_the_best_one():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, chance = rng.random(30) < 0.5, np.round(rng.random(30), 1)
        best = metrics.best_threshold(truth, chance)

        def balanced(cut, truth=truth, chance=chance):
            return metrics.vqa_draws(truth, chance >= cut, np.ones((1, 30)))["balanced_accuracy"][0]

        assert balanced(best) == max(balanced(cut) for cut in np.linspace(-0.01, 1.01, 103))
    assert metrics.best_threshold([True, True], [0.1, 0.9]) == 0.5


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
    table = localization_table(maps, masks, patients, baselines.other_patient(patients), "sasa", mean_masks(masks[:3]))
    rows = localization_records(table, samples=20)
    pointing = {row["system"]: row["value"] for row in rows if row["metric"] == "pointing_game"}
    assert pointing["sasa"] == 1 and pointing["uniform"] == pytest.approx(1 / 16)
    assert set(pointing) == {"sasa", "shuffled_image", "mean_mask", "center", "uniform"}


def test_published_answers_are_compared_by_their_words():
    questions = pd.DataFrame({"answer": ["yes", "The left lung", "pa"], "closed": [True, False, False]})
    questions = questions.assign(kind=["presence", "side", "view"], subject_id=[1, 2, 3])
    rows = published.published_records(
        questions, ["yes", "left lung.", "lateral"], system="sasa", protocol="vqa-rad", samples=20
    )
    assert find(rows, metric="accuracy", section="closed questions") == 1
    assert find(rows, metric="accuracy", section="open questions") == 0.5
    assert find(rows, metric="token_f1", section="view") == 0
    assert published.token_f1("left lung", "right lung") == 0.5


def test_p_is_small_where_resampling_never_turns_the_sign():
    rng = np.random.default_rng(0)
    clear, doubtful = rng.normal(0.3, 0.05, 1001), rng.normal(0.01, 0.05, 1001)
    assert bootstrap.p_value(clear) == 1 / 1000 and bootstrap.p_value(doubtful) > 0.5
    assert bootstrap.p_value(np.zeros(11)) == 1 and bootstrap.p_value(np.full(11, np.nan)) is None


def test_the_pairs_that_a_reader_asks_for():
    systems = Systems({"sasa": "SASA", "mlp": "plain", "toy": "toy"})
    pairs = systems.pairs(["sasa", "mlp", "toy", "nearest_neighbour", "sasa_stage3"])
    assert ("sasa", "nearest_neighbour") in pairs and ("sasa_stage3", "sasa") in pairs and ("mlp", "toy") in pairs
    assert len(set(map(frozenset, pairs))) == len(pairs) and not any("finding_neighbour" in pair for pair in pairs)


def test_other_runs_stand_beside_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "outputs_root", lambda: tmp_path)
    with pytest.raises(UserError, match="'none' has no finished evaluation"):
        runs.read_run("none")
    for seed, (name, value) in enumerate({"first": 0.4, "second": 0.6}.items()):
        folder = tmp_path / name / "07_evaluation"
        folder.mkdir(parents=True)
        record = {"system": "sasa", "task": "report", "metric": "f1", "section": "all", "protocol": "study"}
        (folder / "metrics.json").write_text(json.dumps([record | {"value": value}]))
        (folder / "manifest.json").write_text(json.dumps({"parameters": {"seed": seed}}))
        table = pd.DataFrame({"subject_id": [1, 2], "study_id": [20, 10], "sasa": [f"{name} b", f"{name} a"]})
        table.to_csv(folder / "predictions.csv", index=False)
    both = [runs.read_run(name) for name in ("first", "second")]
    assert runs.reports_of_runs(both, [10, 20])["sasa (second)"] == ["second a", "second b"]
    assert runs.reports_of_runs(both, [10, 30]) == {}  # another run's studies cannot be compared
    summary = runs.over_runs(both, [("report", "f1", "all", "study")]).loc[("sasa", "f1")]
    assert summary["mean"] == pytest.approx(0.5) and summary["count"] == 2
