"""Questions: truthful, balanced, deterministic, worded by a grammar of which a part is held out."""

import numpy as np
import pandas as pd
import pytest

from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.data.questions import (
    ANSWERS,
    QUESTIONS,
    build_questions,
    is_closed,
    normalize_answer,
    reword,
    stated_answers,
)
from lightmedvlm_utils.data.wordings import DEVICES, KINDS, wordings
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS
from lightmedvlm_utils.phantom.patients import sample_patients
from lightmedvlm_utils.phantom.reports import write_findings

LABEL_KINDS = ("presence", "normality")


def make_studies(n: int = 400, seed: int = 0) -> pd.DataFrame:
    """Label j is positive in about (5 + 4 j) % of the studies; a tenth uncertain, the rest 0 or blank."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"study_id": rng.permutation(n) + 50_000_000})
    for number, label in enumerate(LABELS):
        positive = 0.05 + 0.04 * number
        rest = 0.9 - positive
        frame[label] = rng.choice([1, -1, 0, np.nan], size=n, p=[positive, 0.1, rest * 0.3, rest * 0.7])
    return frame


@pytest.fixture(scope="module")
def phantom() -> tuple[pd.DataFrame, dict]:
    """Studies with reports in the phantom's language, and what is true of them."""
    studies = [study for patient in sample_patients(250, 5) for study in patient.studies]
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"study_id": [study.study_id for study in studies]})
    frame["report"] = [f"Findings: {write_findings(study, rng)}" for study in studies]
    frame["images"] = [[{"path": "x.jpg", "view": study.views[0].position}] for study in studies]
    frame[list(LABELS)] = label_reports(frame["report"])
    return frame, {study.study_id: study for study in studies}


def every_wording():
    subjects = [("presence", label) for label in LABELS if label != "No Finding"]
    subjects += [("normality", "No Finding"), ("view", ""), ("device", ""), *(("device", name) for name in DEVICES)]
    subjects += [(kind, label) for kind in ("side", "zone", "severity") for label in LABELS if label != "No Finding"]
    subjects += [("count", label) for label in ("Fracture", "Lung Lesion", "Support Devices")]
    for kind, subject in subjects:
        for negated in (False, True) if kind in LABEL_KINDS or (kind == "device" and subject) else (False,):
            yield kind, subject, "", negated
        for value in {"side": ("left", "right"), "view": ("AP", "PA")}.get(kind, ()):
            yield kind, subject, value, False


def test_the_grammar_holds_out_whole_wordings():
    for kind, subject, value, negated in every_wording():
        known, held_out = wordings(kind, subject, value, negated)
        assert len(known) >= 4 and len(held_out) >= 2 and not set(known) & set(held_out)
        is_open = kind in ("zone", "severity", "count") or (kind in ("side", "view") and not value)
        is_open |= kind == "device" and not subject
        for text in (*known, *held_out):
            assert text[0].isupper() and text.endswith("?") and "{" not in text and "  " not in text
            assert is_closed(text) != is_open, text
    assert tuple(QUESTIONS) == LABELS and all(len(group) >= 3 for group in QUESTIONS.values())


@pytest.mark.parametrize("synthetic", [False, True])
def test_truthful_and_balanced(synthetic):
    studies = make_studies()
    questions = build_questions(studies, 6, 0, synthetic)
    states = studies.set_index("study_id")
    state = np.array([states.at[s, label] for s, label in zip(questions.study_id, questions.label, strict=True)])
    there = (questions.answer == "yes") != questions.negated
    assert (state[there] == 1).all()
    assert ((state[~there] == 0) | np.isnan(state[~there])).all()
    for row in questions.itertuples():
        assert row.question in wordings(row.kind, row.subject, row.value, row.negated).known
    counts = questions.groupby(["label", "negated", "answer"]).size().unstack()
    assert (counts["yes"] == counts["no"]).all() and counts.index.get_level_values(0).nunique() == 14
    assert not questions.duplicated(["study_id", "label", "question"]).any()


def test_open_answers_are_true_of_the_patient(phantom):
    studies, truth = phantom
    questions = build_questions(studies, 12, 0)
    assert set(questions["kind"]) == set(KINDS)
    checked = 0
    for row in questions[questions["kind"].isin(["side", "device"])].itertuples():
        certain = [found for found in truth[row.study_id].findings if found.label == row.label and found.state == 1]
        if row.kind == "side":
            sides = {found.side for found in certain}
            if len(sides) == 1:
                side = {"bilateral": "both sides"}.get(*sides, *sides)
                assert row.answer == (("no", "yes")[row.value == side] if row.value else side)
                checked += 1
        else:
            devices = [name for name in DEVICES if name in {found.kind for found in certain}]
            there = (row.subject in devices) != row.negated
            assert row.answer == (("no", "yes")[there] if row.subject else ", ".join(devices) or "none")
            checked += 1
    assert checked > 200
    closed = questions[questions["closed"]].groupby("kind")["answer"].value_counts().unstack()
    assert ((closed["yes"] - closed["no"]).abs() <= 0.1 * closed.sum(axis=1) + 2).all()


def test_an_answer_is_normalized_or_unresolved_never_guessed(phantom):
    studies, _ = phantom
    for kind, stated in stated_answers(studies, KINDS).items():
        assert len(stated) > 20
        for found in stated:
            assert normalize_answer(kind, found.answer) == found.answer
            assert kind == "device" or found.answer in ANSWERS[kind]
    for kind, text in [("side", ""), ("side", "left or right"), ("zone", "the heart"), ("severity", "mild to moderate"),
                       ("device", "a spoon"), ("device", "none, pacemaker"), ("count", "many")]:  # fmt: skip
        assert normalize_answer(kind, text) == "", (kind, text)
    assert normalize_answer("side", "Bilateral.") == "both sides"
    assert normalize_answer("device", "Pacemaker and an endotracheal tube") == "endotracheal tube, pacemaker"


def test_other_words_ask_the_same(phantom):
    questions = build_questions(phantom[0], 4, 0)
    for held_out in (True, False):
        again = reword(questions, 1, held_out)
        assert (again != questions["question"]).all()
        for row, text in zip(questions.itertuples(), again, strict=True):
            assert text in wordings(row.kind, row.subject, row.value, row.negated)[held_out]


def test_budget_binds_the_frequent_labels_first():
    studies = make_studies()
    small, large = (build_questions(studies, per_study, 0) for per_study in (2, 50))
    assert len(small) <= 2 * len(studies) < len(large)
    counts, available = small["label"].value_counts(), large["label"].value_counts()
    assert counts.max() - counts.min() == 0 or (counts[counts < counts.max()] == available[counts < counts.max()]).all()


def test_synthetic_questions_fill_up_the_minority():
    studies = make_studies()
    natural, mixed = (build_questions(studies, 6, 0, synthetic) for synthetic in (False, True))
    assert not natural["synthetic"].any()
    pd.testing.assert_frame_equal(mixed[~mixed["synthetic"]].reset_index(drop=True), natural)
    before, after = natural["label"].value_counts(), mixed["label"].value_counts()
    assert after["Atelectasis"] == 3 * before["Atelectasis"]  # the rarest: every positive asked three times
    assert after.min() / after.max() > before.min() / before.max()
    assert after.max() == before.max()


def absent(questions: pd.DataFrame, label: str) -> pd.Series:
    """The studies asked about a label that they are said not to show."""
    asked = questions[questions["label"] == label]
    return asked[(asked["answer"] == "no") != asked["negated"]]["study_id"]


def test_blank_is_asked_only_where_zero_does_not_suffice():
    studies = make_studies()
    studies["Edema"] = [1.0] * 20 + [0.0] * 30 + [np.nan] * 350
    asked = absent(build_questions(studies, 50, 0), "Edema")
    assert studies.set_index("study_id").loc[asked, "Edema"].eq(0).all()


def test_a_parent_is_not_denied_where_its_child_is_named():
    studies = make_studies()
    studies["Enlarged Cardiomediastinum"] = [1.0] * 200 + [np.nan] * 200
    asked = absent(build_questions(studies, 50, 0), "Enlarged Cardiomediastinum")
    assert len(asked) and not studies.set_index("study_id").loc[asked, "Cardiomegaly"].isin([1, -1]).any()


def test_deterministic_in_seed_and_independent_of_row_order(phantom):
    studies, _ = phantom
    first = build_questions(studies, 6, 3, True)
    pd.testing.assert_frame_equal(first, build_questions(studies.sample(frac=1, random_state=1), 6, 3, True))
    assert not first.equals(build_questions(studies, 6, 4, True))


def test_edges():
    blank = make_studies(10)
    blank[list(LABELS)] = np.nan
    assert build_questions(blank, 6, 0, True).empty
    with pytest.raises(UserError, match="Edema"):
        build_questions(blank.drop(columns="Edema"), 6, 0)
    with pytest.raises(UserError, match="severity"):
        build_questions(blank, 6, 0, kinds=["severty"])
