"""Questions: truthful, balanced per label, deterministic."""

import numpy as np
import pandas as pd
import pytest

from lightmedvlm_utils.data.questions import QUESTIONS, build_questions
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS


def make_studies(n: int = 400, seed: int = 0) -> pd.DataFrame:
    """Label j is positive in about (5 + 4 j) % of the studies; a tenth uncertain, the rest 0 or blank."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"study_id": rng.permutation(n) + 50_000_000})
    for number, label in enumerate(LABELS):
        positive = 0.05 + 0.04 * number
        rest = 0.9 - positive
        frame[label] = rng.choice([1, -1, 0, np.nan], size=n, p=[positive, 0.1, rest * 0.3, rest * 0.7])
    return frame


def test_wordings():
    assert tuple(QUESTIONS) == LABELS
    wordings = [wording for group in QUESTIONS.values() for wording in group]
    assert len(set(wordings)) == len(wordings)
    assert all(wording.endswith("?") for wording in wordings)


@pytest.mark.parametrize("synthetic", [False, True])
def test_truthful_and_balanced(synthetic):
    studies = make_studies()
    questions = build_questions(studies, 6, 0, synthetic)
    states = studies.set_index("study_id")
    state = np.array([states.at[s, label] for s, label in zip(questions.study_id, questions.label, strict=True)])
    assert (state[questions.answer == "yes"] == 1).all()
    answered_no = state[questions.answer == "no"]
    assert ((answered_no == 0) | np.isnan(answered_no)).all()
    assert all(q in QUESTIONS[label] for q, label in zip(questions.question, questions.label, strict=True))
    counts = questions.groupby(["label", "answer"]).size().unstack()
    assert (counts["yes"] == counts["no"]).all() and len(counts) == 14
    assert not questions.duplicated(["study_id", "label", "question"]).any()


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
    assert after["Atelectasis"] == 3 * before["Atelectasis"]  # the rarest: every wording of every positive
    assert after.min() / after.max() > before.min() / before.max()
    assert after.max() == before.max()


def test_blank_is_asked_only_where_zero_does_not_suffice():
    studies = make_studies()
    studies["Edema"] = [1.0] * 20 + [0.0] * 30 + [np.nan] * 350
    asked = build_questions(studies, 50, 0).query("label == 'Edema' and answer == 'no'")["study_id"]
    assert studies.set_index("study_id").loc[asked, "Edema"].eq(0).all()


def test_a_parent_is_not_denied_where_its_child_is_named():
    studies = make_studies()
    studies["Enlarged Cardiomediastinum"] = [1.0] * 200 + [np.nan] * 200
    asked = build_questions(studies, 50, 0).query("label == 'Enlarged Cardiomediastinum' and answer == 'no'")
    assert len(asked) and not studies.set_index("study_id").loc[asked["study_id"], "Cardiomegaly"].isin([1, -1]).any()


def test_deterministic_in_seed_and_independent_of_row_order():
    studies = make_studies()
    first = build_questions(studies, 6, 3, True)
    pd.testing.assert_frame_equal(first, build_questions(studies.sample(frac=1, random_state=1), 6, 3, True))
    assert not first.equals(build_questions(studies, 6, 4, True))


def test_edges():
    blank = make_studies(10)
    blank[list(LABELS)] = np.nan
    assert build_questions(blank, 6, 0, True).empty
    with pytest.raises(UserError, match="Edema"):
        build_questions(blank.drop(columns="Edema"), 6, 0)
