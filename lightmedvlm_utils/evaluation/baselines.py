"""What a model must beat: systems that have not seen the patient's image, or only looked for a similar one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.questions import stated_answers
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.observations import LABELS


def most_frequent_report(train_reports: Sequence[str]) -> str:
    """The report that occurs most often among the training reports, by its words; the first one in a tie."""
    counts = Counter(tuple(metrics.words(report)) for report in train_reports)
    if not counts:
        raise UserError("The training split has no reports, so there is no most frequent one.")
    favorite = counts.most_common(1)[0][0]
    return next(report for report in train_reports if tuple(metrics.words(report)) == favorite)


def nearest_neighbors(train_features: np.ndarray, test_features: np.ndarray) -> np.ndarray:
    """For each test image the row of the most similar training image: cosine of features `(n, C)`."""

    def unit(features: np.ndarray) -> np.ndarray:
        features = np.asarray(features, float)
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    return (unit(test_features) @ unit(train_features).T).argmax(1)


def token_summary(studies: Sequence[np.ndarray]) -> np.ndarray:
    """What a study is looked up by, of its tokens `(N, C)`: mean, maximum and minimum over all places,
    `(n, 3 C)`. Chosen among such summaries on validation studies."""
    return np.stack([np.concatenate([t.mean(0), t.max(0), t.min(0)]) for t in map(np.asarray, studies)])


def other_patient(patients: Sequence, seed: int = 0) -> np.ndarray:
    """A permutation `(n,)` that gives every study another patient's study; each is used exactly once.

    Patients are put in random order, studies of one patient side by side; a rotation by the longest patient's
    number of studies then leaves no one with their own. Raises UserError where one patient has over half.
    """
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    longest = np.bincount(index).max()
    if 2 * longest > len(index):
        raise UserError("One patient has more than half of the evaluated studies; evaluate more patients.")
    order = np.argsort(np.random.default_rng(seed).permutation(index.max() + 1)[index], kind="stable")
    shuffled = np.empty(len(index), int)
    shuffled[order] = np.roll(order, -longest)
    return shuffled


def most_frequent_answers(train_questions: pd.DataFrame, questions: pd.DataFrame) -> list[str]:
    """Per question the commonest training answer to the same question in any words; "no" where answers tie."""
    asked = ["kind", "label", "subject", "value", "negated"]
    counts = train_questions.value_counts([*asked, "answer"]).reset_index()
    counts = counts.sort_values(["count", "answer"], ascending=[False, True], kind="stable")
    commonest = counts.drop_duplicates(asked).set_index(asked)["answer"].to_dict()
    return [commonest.get(key, "no") for key in questions[asked].itertuples(index=False, name=None)]


def text_only_answers(train_questions: pd.DataFrame, questions: pd.DataFrame) -> list[str]:
    """Answers of a classifier that reads the question's words and sees no image: what the wording gives away.

    A logistic regression on words and pairs of words, one for yes/no questions and one for the others.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    answers = pd.Series("", index=questions.index)
    for closed, asked in questions.groupby("closed"):
        known = train_questions[train_questions["closed"] == closed]
        if known["answer"].nunique() < 2:
            answers[asked.index] = known["answer"].iloc[0] if len(known) else ""
            continue
        reader = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=500))
        answers[asked.index] = reader.fit(known["question"], known["answer"]).predict(asked["question"])
    return answers.tolist()


def neighbor_answers(questions: pd.DataFrame, neighbors: pd.DataFrame, otherwise: Sequence[str]) -> list[str]:
    """Each question answered from another study's labels and report: row i of `neighbors`, a study table.

    `otherwise` answers what that report does not say (the side of an effusion that it has not).
    """
    known = neighbors.drop_duplicates("study_id")
    stated = {
        (found.study_id, found.kind, found.subject): found.answer
        for of_kind in stated_answers(known, set(questions["kind"])).values()
        for found in of_kind
    }
    answers = []
    states = {label: neighbors[label].to_numpy(float) for label in LABELS}
    rows = zip(questions.itertuples(), neighbors["study_id"], otherwise, strict=True)
    for place, (question, study_id, fallback) in enumerate(rows):
        if question.kind in ("presence", "normality"):
            answers.append("yes" if (states[question.label][place] == 1) != question.negated else "no")
            continue
        about = "" if question.kind == "device" else question.subject
        found = stated.get((int(study_id), question.kind, about), "")
        if not found or not question.closed:
            answers.append(found or fallback)
        else:
            is_there = (question.value or question.subject) in found.split(", ")
            answers.append("yes" if is_there != question.negated else "no")
    return answers
