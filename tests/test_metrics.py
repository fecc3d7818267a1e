"""Metrics: known answers, agreement with reference implementations, and what a bootstrap must satisfy."""

import json
import math
import time

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.evaluation.bootstrap import Estimate, bootstrap_weights, estimate, records
from lightmedvlm_utils.observations import LABELS

REFERENCES = [
    "Findings: The heart is enlarged. Small left pleural effusion. Impression: Cardiomegaly.",
    "Findings: The lungs are clear. No pneumothorax. Impression: No acute disease.",
    "Findings: A 1.2-cm nodule in the right upper lobe. Impression: Nodule.",
    "Findings: Right basal opacity, likely pneumonia. Impression: Pneumonia.",
]
HYPOTHESES = [
    "Findings: The heart is enlarged. No pleural effusion. Impression: Cardiomegaly.",
    "Findings: The lungs are clear. Impression: No acute disease.",
    "",
    "Findings: Left basal opacity. Impression: Atelectasis.",
]


def ones(n):
    return np.ones((1, n))


def random_labels(n, seed, missing=0.3):
    rng = np.random.default_rng(seed)
    states = rng.choice([1.0, 0.0, -1.0], size=(n, 14), p=[0.3, 0.6, 0.1])
    states[rng.random((n, 14)) < missing] = np.nan
    return pd.DataFrame(states, columns=LABELS)


def test_words_keep_measurements_and_drop_headings():
    assert metrics.words("FINDINGS: A 1.2-cm nodule at T11. No PTX.") == [
        *("a", "1.2", "cm", "nodule", "at", "t11", "no", "ptx")
    ]
    assert metrics.words("Impression: ___ doesn't change") == ["doesn't", "change"]
    assert metrics.words("") == []


def test_bleu_equals_pycocoevalcap_in_every_subset():
    from pycocoevalcap.bleu.bleu import Bleu

    counts = metrics.bleu_counts(REFERENCES, HYPOTHESES)

    def subset(texts, rows):
        return {i: [" ".join(metrics.words(texts[row]))] for i, row in enumerate(rows)}

    for rows in ([0, 1, 2, 3], [0, 0, 1], [2], [3, 1, 1]):
        expected = Bleu(4).compute_score(subset(REFERENCES, rows), subset(HYPOTHESES, rows), verbose=0)[0]
        assert metrics.bleu(counts[rows].sum(0)) == pytest.approx(expected, abs=1e-12)


def test_identical_reports_score_one_and_empty_reports_zero():
    same = metrics.lexical_draws(REFERENCES, REFERENCES, ones(4))
    assert same["bleu_4"][0] == pytest.approx(1) and same["rouge_l"][0] == pytest.approx(1)
    nothing = metrics.lexical_draws(REFERENCES, [""] * 4, ones(4))
    assert [nothing[name][0] for name in ("bleu_1", "rouge_l", "cider", "mean_words")] == [0, 0, 0, 0]


def test_the_reference_is_never_truncated():
    long = "Findings: " + " ".join(f"w{i}" for i in range(300))
    counts = metrics.bleu_counts([long], ["Findings: w0 w1"])
    assert counts[0, -1] == 300


def test_distinct_ratio():
    assert metrics.distinct_ratio(["a b.", "A b", "c"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("uncertain_as", ["positive", "negative"])
def test_label_f1_equals_scikit_learn(uncertain_as):
    reference, predicted = random_labels(80, 0), random_labels(80, 1)
    score = metrics.label_f1(reference, predicted, uncertain_as)
    truth, guess = metrics.positive(reference, uncertain_as), metrics.positive(predicted, uncertain_as)
    assert score.macro == pytest.approx(sk.f1_score(truth, guess, average="macro"))
    assert score.micro == pytest.approx(sk.f1_score(truth, guess, average="micro"))
    assert score.table["f1"].to_numpy() == pytest.approx(sk.f1_score(truth, guess, average=None))
    five = [LABELS.index(label) for label in metrics.FIVE_LABELS]
    assert score.macro_5 == pytest.approx(sk.f1_score(truth[:, five], guess[:, five], average="macro"))
    assert score.left_out == ()


def test_labels_without_positives_are_left_out_but_false_alarms_count():
    reference = pd.DataFrame(0.0, index=range(4), columns=LABELS)
    predicted = reference.copy()
    reference["Edema"] = predicted["Edema"] = 1.0
    predicted["Fracture"] = 1.0  # a false alarm: F1 0, kept in the macro
    score = metrics.label_f1(reference, predicted)
    assert set(score.left_out) == set(LABELS) - {"Edema", "Fracture"}
    assert score.macro == 0.5
    assert math.isnan(score.table.loc["Pneumonia", "f1"])


def test_uncertain_rule_and_unknown_rule():
    labels = pd.DataFrame([[-1.0] * 14], columns=LABELS)
    assert metrics.positive(labels, "positive").all() and not metrics.positive(labels, "negative").any()
    with pytest.raises(UserError, match="maybe"):
        metrics.positive(labels, "maybe")


def test_vqa_metrics_equal_scikit_learn():
    rng = np.random.default_rng(3)
    truth = rng.random(200) < 0.3
    probability = np.round(np.clip(0.3 * truth + 0.7 * rng.random(200), 0, 1), 1)  # many ties
    guess = probability > 0.5
    scores = {name: draws[0] for name, draws in metrics.vqa_draws(truth, guess, ones(200)).items()}
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert scores["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, guess))
    assert scores["mcc"] == pytest.approx(sk.matthews_corrcoef(truth, guess))
    ranked = metrics.probability_draws(truth, probability, ones(200))
    assert ranked["auroc"][0] == pytest.approx(sk.roc_auc_score(truth, probability))


def test_weighted_auroc_equals_repeating_the_items():
    rng = np.random.default_rng(4)
    truth, probability = rng.random(40) < 0.5, np.round(rng.random(40), 1)
    weights = bootstrap_weights(np.arange(40) // 2, samples=5, seed=1)
    draws = metrics.probability_draws(truth, probability, weights)["auroc"]
    for row, value in zip(weights.astype(int), draws, strict=True):
        repeated = np.repeat(np.arange(40), row)
        assert value == pytest.approx(sk.roc_auc_score(truth[repeated], probability[repeated]))


def test_constant_answers_are_worth_nothing():
    scores = metrics.vqa_draws([True, False, False, False], [False] * 4, ones(4))
    assert scores["accuracy"][0] == 0.75  # what accuracy alone would praise
    assert scores["balanced_accuracy"][0] == 0.5 and scores["mcc"][0] == 0


def test_calibration_error_of_known_cases():
    truth = [True] * 5 + [False] * 5
    perfect = metrics.probability_draws(truth, np.array(truth, float), ones(10))
    assert perfect["ece"][0] == 0 and perfect["auroc"][0] == 1
    assert metrics.probability_draws(truth, [0.9] * 10, ones(10))["ece"][0] == pytest.approx(0.4)
    table = metrics.calibration_table(truth, [0.95] * 10)
    assert table[["yes", "n"]].values.tolist() == [[0.5, 10]]


def test_bootstrap_draws_whole_patients():
    patients = np.array([7, 7, 7, 2, 9, 9])
    weights = bootstrap_weights(patients, samples=50, seed=0)
    assert weights.shape == (51, 6) and (weights[0] == 1).all()
    for patient in np.unique(patients):
        same = weights[:, patients == patient]
        assert (same == same[:, :1]).all()
    first_of_each = weights[:, [0, 3, 4]]
    assert (first_of_each.sum(1) == 3).all()
    assert (weights == bootstrap_weights(patients, samples=50, seed=0)).all()
    with pytest.raises(UserError, match="no studies"):
        bootstrap_weights([], 10)


def test_interval_is_wider_when_studies_of_a_patient_agree():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    truth = np.repeat(rng.random(40) < 0.5, 5)  # a patient's five answers are all right or all wrong
    clustered, naive = (
        estimate(metrics.vqa_draws(truth, np.ones(200, bool), bootstrap_weights(groups, 500))["accuracy"])
        for groups in (patients, np.arange(200))
    )
    assert clustered.value == naive.value
    assert clustered.high - clustered.low > 1.5 * (naive.high - naive.low)
    assert clustered.low < clustered.value < clustered.high


def test_paired_difference_of_equal_systems_is_zero():
    weights = bootstrap_weights(range(4), 100)
    draws = metrics.lexical_draws(REFERENCES, HYPOTHESES, weights)
    assert estimate(draws["bleu_2"] - draws["bleu_2"]) == Estimate(0, 0, 0)


def test_records_are_strict_json():
    rows = records(
        {"auroc": np.full(11, np.nan), "distinct_ratio": Estimate(0.5)},
        system="sasa", task="vqa", n=3, unit="question",
    )  # fmt: skip
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["value"] for row in rows] == [None, 0.5] and rows[1]["low"] is None
    assert " ".join(rows[0]) == "system task metric value low high n unit protocol section split"


def test_a_thousand_samples_of_450_studies_take_seconds():
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(80)])
    reports = [" ".join(rng.choice(vocabulary, 45)) for _ in range(900)]
    start = time.monotonic()
    weights = bootstrap_weights(np.arange(450) // 2, 1000)
    metrics.lexical_draws(reports[:450], reports[450:], weights)
    metrics.label_draws(random_labels(450, 0), random_labels(450, 1), weights)
    assert time.monotonic() - start < 10


def test_meteor_without_java_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="Java"):
        metrics.meteor_draws(REFERENCES, HYPOTHESES, ones(4))
