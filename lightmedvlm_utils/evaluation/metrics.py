"""What a report and a yes/no answer are worth. Functions named `*_draws` return bootstrap draws of metrics.

Their `weights` come from `bootstrap_weights`: element 0 is the point estimate, the others are the resamples.
What is compared (which section, which words, how often a study counts) is the protocol's business: `protocols.py`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS

# The five observations of the CheXpert competition (Irvin et al. 2019, arXiv 1901.07031).
FIVE_LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
UncertainAs = Literal["positive", "negative"]
Draws = dict[str, np.ndarray]  # metric -> (1 + samples,) values, the point estimate first
Tokenize = Callable[[str], list[str]]

_HEADING = re.compile(r"\b(?:findings|impression)\s*:", re.IGNORECASE)
_WORD = re.compile(r"\d+\.\d+|[^\W_]+(?:['’][^\W_]+)*")


def words(report: str) -> list[str]:
    """Lower-cased words of a report; decimals stay whole, section headings and punctuation go.

    >>> words("Findings: A 1.2-cm nodule, left. No PTX.")
    ['a', '1.2', 'cm', 'nodule', 'left', 'no', 'ptx']
    """
    return _WORD.findall(_HEADING.sub(" ", report).lower())


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient that is NaN, silently, where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def mean(values: Sequence[float] | np.ndarray, weights: np.ndarray) -> np.ndarray:
    return ratio(weights @ np.asarray(values, float), weights.sum(1))


# ------------------------------------------------------------------------------------------ lexical overlap


def tokenized(reports: Sequence[str], tokenize: Tokenize = words) -> dict[int, list[str]]:
    """The reports as pycocoevalcap takes them: a list with one text by number."""
    return {index: [" ".join(tokenize(report))] for index, report in enumerate(reports)}


def bleu_counts(references: Sequence[str], hypotheses: Sequence[str], tokenize: Tokenize = words) -> np.ndarray:
    """Per study `(n, 10)`: matched and proposed 1- to 4-grams, hypothesis length, reference length."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rows = []
    for (reference,), (hypothesis,) in zip(
        tokenized(references, tokenize).values(), tokenized(hypotheses, tokenize).values(), strict=True
    ):
        counts = cook_test(hypothesis, cook_refs([reference]))
        rows.append([*counts["correct"], *counts["guess"], counts["testlen"], *counts["reflen"]])
    return np.array(rows, float).reshape(-1, 10)


def bleu(totals: np.ndarray) -> np.ndarray:
    """Corpus BLEU-1 to 4 `(..., 4)` from summed `bleu_counts` `(..., 10)` (Papineni et al. 2002).

    The small constants are those of pycocoevalcap, so the values are the same to the last digit.
    """
    matched, proposed, length, reference_length = np.split(totals, [4, 8, 9], axis=-1)
    precision = (matched + 1e-15) / (proposed + 1e-9)
    score = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, 5))
    relative = (length + 1e-15) / (reference_length + 1e-9)
    return score * np.exp(np.minimum(0, 1 - 1 / relative))


class _Overlap(NamedTuple):
    """What lexical metrics are made of, per study: `bleu_counts` (n, 10); the others (n,)."""

    counts: np.ndarray
    rouge_l: np.ndarray
    cider: np.ndarray
    words: np.ndarray  # of the hypothesis


def _overlap(references: Sequence[str], hypotheses: Sequence[str], tokenize: Tokenize) -> _Overlap:
    from pycocoevalcap.cider.cider import Cider

    counts = bleu_counts(references, hypotheses, tokenize)
    expected, proposed = tokenized(references, tokenize), tokenized(hypotheses, tokenize)
    rouge_l = np.array([_rouge_l(expected[index][0], proposed[index][0]) for index in expected])
    return _Overlap(counts, rouge_l, Cider().compute_score(expected, proposed)[1], counts[:, 8])


def _rouge_l(reference: str, hypothesis: str, beta: float = 1.2) -> float:
    """F of the longest common subsequence (Lin 2004) of words: pycocoevalcap's to the last digit, tens of times faster.

    A row of the usual table is one integer: a bit is 0 where the length grows (Hyyrö 2004, bit-parallel LCS).
    """
    expected, proposed = reference.split(" "), hypothesis.split(" ")
    places: dict[str, int] = {}
    for place, word in enumerate(expected):
        places[word] = places.get(word, 0) | 1 << place
    row = everywhere = (1 << len(expected)) - 1
    for word in proposed:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    common = len(expected) - row.bit_count()
    precision, recall = common / len(proposed), common / len(expected)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if common else 0.0


def lexical_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, tokenize: Tokenize = words
) -> Draws:
    """BLEU-1 to 4 (corpus level), ROUGE-L (F, beta 1.2), CIDEr and mean length in words, per bootstrap draw.

    CIDEr takes its document frequencies from the whole set of references, in every draw: a CIDEr of another
    subset is another scale. Its value is 0 for a single study.
    """
    overlap = _overlap(references, hypotheses, tokenize)
    scores = bleu(weights @ overlap.counts)
    return {
        **{f"bleu_{order}": scores[:, order - 1] for order in (1, 2, 3, 4)},
        "rouge_l": mean(overlap.rouge_l, weights),
        "cider": mean(overlap.cider, weights),
        "mean_words": mean(overlap.words, weights),
    }


def lexical_per_study(references: Sequence[str], hypotheses: Sequence[str]) -> pd.DataFrame:
    """BLEU-4, ROUGE-L, CIDEr and number of words of each report `(n, 4)`.

    BLEU-4 of one report is pycocoevalcap's sentence score: no smoothing but its small constants, so it is next to
    0 without a common 4-gram, and its mean is not the BLEU-4 of the corpus. The means of the others are.
    """
    overlap = _overlap(references, hypotheses, words)
    scores = {"bleu_4": bleu(overlap.counts)[:, 3], "rouge_l": overlap.rouge_l, "cider": overlap.cider}
    return pd.DataFrame({**scores, "words": overlap.words.astype(int)})


def length_draws(reports: Sequence[str], weights: np.ndarray, tokenize: Tokenize = words) -> Draws:
    """Mean length in words, per bootstrap draw."""
    return {"mean_words": mean([len(tokenize(report)) for report in reports], weights)}


@lru_cache(maxsize=1)
def _meteor():
    """The program, started once: reading its tables takes longer than scoring hundreds of reports."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def meteor_draws(
    references: Sequence[str],
    hypotheses: Sequence[str],
    weights: np.ndarray,
    tokenize: Tokenize = words,
    corpus: bool = False,
) -> Draws:
    """METEOR 1.5 per bootstrap draw: mean over studies, or of the `corpus`, which is what pycocoevalcap returns and
    papers print. It is a Java program: raises UserError where there is no Java."""
    if shutil.which("java") is None:
        raise UserError("METEOR needs a Java runtime, and there is none: install one, or set meteor=False.")
    meteor = _meteor()
    expected, proposed = tokenized(references, tokenize), tokenized(hypotheses, tokenize)
    if not corpus:
        return {"meteor": mean(meteor.compute_score(expected, proposed)[1], weights)}
    counts = np.array([meteor._stat(proposed[i][0], expected[i]).split() for i in expected], float)
    # METEOR of a corpus is a function of summed counts, as BLEU is: one line asks for all resamples. The program
    # answers a line each, and one for all together, which means nothing here.
    asked = " ||| ".join(" ".join(map(str, row)) for row in (weights @ counts).tolist())
    meteor.meteor_p.stdin.write(f"EVAL ||| {asked}\n".encode())
    meteor.meteor_p.stdin.flush()
    answers = [float(meteor.meteor_p.stdout.readline()) for _ in range(len(weights) + 1)]
    return {"meteor": np.array(answers[:-1])}


def distinct_ratio(reports: Sequence[str]) -> float:
    """Share of reports that differ from all others: near 0 where a model has collapsed to a template."""
    return len({tuple(words(report)) for report in reports}) / len(reports)


# ---------------------------------------------------------------------------------------------- 14 labels


def positive(labels: pd.DataFrame, uncertain_as: UncertainAs = "positive") -> np.ndarray:
    """Boolean `(n, 14)` in the order of LABELS from states 1, 0, -1 and NaN (not mentioned: negative)."""
    if uncertain_as not in ("positive", "negative"):
        raise UserError(f"uncertain_as is {uncertain_as!r}; use 'positive' or 'negative'.")
    states = labels[list(LABELS)].to_numpy(float)
    return (states == 1) | (states == -1) if uncertain_as == "positive" else states == 1


def _confusion(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weighted true positives, false positives, false negatives, true negatives, each `(draws, k)`."""
    cells = (truth & predicted, ~truth & predicted, truth & ~predicted, ~truth & ~predicted)
    return tuple(weights @ cell.astype(float) for cell in cells)


def label_draws(
    reference: pd.DataFrame,
    predicted: pd.DataFrame,
    weights: np.ndarray,
    uncertain_as: UncertainAs = "positive",
) -> Draws:
    """Macro and micro F1 over the 14 labels and over FIVE_LABELS, per bootstrap draw.

    A label without a positive on either side has no F1 and is left out of the macro (`label_f1` lists it).
    The labels come from our rule-based labeler, hence not "CheXbert F1".
    """
    truth, guess = positive(reference, uncertain_as), positive(predicted, uncertain_as)
    hits, alarms, misses, _ = _confusion(truth, guess, weights)
    draws = {}
    for suffix, names in (("", LABELS), ("_5", FIVE_LABELS)):
        columns = [LABELS.index(name) for name in names]
        tp, errors = hits[:, columns], (alarms + misses)[:, columns]
        per_label = np.ma.masked_invalid(ratio(2 * tp, 2 * tp + errors))
        draws[f"label_macro_f1{suffix}"] = per_label.mean(1).filled(np.nan)
        draws[f"label_micro_f1{suffix}"] = ratio(2 * tp.sum(1), (2 * tp + errors).sum(1))
    return draws


def per_label_draws(
    reference: pd.DataFrame,
    predicted: pd.DataFrame,
    weights: np.ndarray,
    uncertain_as: UncertainAs = "positive",
) -> Draws:
    """F1 of each label, per bootstrap draw; NaN where a draw has no positive on either side."""
    truth, guess = positive(reference, uncertain_as), positive(predicted, uncertain_as)
    tp, fp, fn, _ = _confusion(truth, guess, weights)
    scores = ratio(2 * tp, 2 * tp + fp + fn)
    return {label: scores[:, index] for index, label in enumerate(LABELS)}


class LabelF1(NamedTuple):
    """`table` has a row per label: precision, recall, f1, support, predicted; `left_out` have no positive."""

    table: pd.DataFrame
    macro: float
    micro: float
    macro_5: float
    micro_5: float
    left_out: tuple[str, ...]


def label_f1(reference: pd.DataFrame, predicted: pd.DataFrame, uncertain_as: UncertainAs = "positive") -> LabelF1:
    """Agreement of two label tables (14 columns of 1, 0, -1, NaN; rows in the same order)."""
    everyone = np.ones((1, len(reference)))
    truth, guess = positive(reference, uncertain_as), positive(predicted, uncertain_as)
    tp, fp, fn, _ = (cell[0] for cell in _confusion(truth, guess, everyone))
    columns = {
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "support": (tp + fn).astype(int),
        "predicted": (tp + fp).astype(int),
    }
    table = pd.DataFrame(columns, index=pd.Index(LABELS, name="label"))
    scores = label_draws(reference, predicted, everyone, uncertain_as)
    names = ("label_macro_f1", "label_micro_f1", "label_macro_f1_5", "label_micro_f1_5")
    left_out = tuple(table.index[table["f1"].isna()])
    macro, micro, macro_5, micro_5 = (float(scores[name][0]) for name in names)
    return LabelF1(table, macro, micro, macro_5, micro_5, left_out)


def label_counts(
    reference: pd.DataFrame, predicted: pd.DataFrame, uncertain_as: UncertainAs = "positive"
) -> pd.DataFrame:
    """True positives, false positives and false negatives of each study's 14 labels `(n, 3)`: summed over studies
    they give the micro F1."""
    truth, guess = positive(reference, uncertain_as), positive(predicted, uncertain_as)
    cells = {"label_tp": truth & guess, "label_fp": ~truth & guess, "label_fn": truth & ~guess}
    return pd.DataFrame({name: cell.sum(1) for name, cell in cells.items()})


# ------------------------------------------------------------------------------------------ yes/no answers


def vqa_draws(truth: Sequence[bool], predicted: Sequence[bool], weights: np.ndarray) -> Draws:
    """Accuracy, sensitivity, specificity, their mean and Matthews' correlation, per bootstrap draw."""
    cells = _confusion(np.asarray(truth, bool)[:, None], np.asarray(predicted, bool)[:, None], weights)
    tp, fp, fn, tn = (cell[:, 0] for cell in cells)
    sensitivity, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": ratio(tp + tn, weights.sum(1)),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        # A constant answer correlates with nothing: by convention 0, not undefined.
        "mcc": np.where(spread == 0, 0.0, np.nan_to_num(ratio(tp * tn - fp * fn, spread))),
    }


def best_threshold(truth: Sequence[bool], probability: Sequence[float]) -> float:
    """The threshold on the probability of "yes" with the best balanced accuracy; 0.5 where nothing can be chosen.

    Of equally good ones the middle of the widest gap between probabilities. To be chosen on the validation split.
    """
    is_yes, chance = np.asarray(truth, bool), np.asarray(probability, float)
    if is_yes.all() or not is_yes.any():
        return 0.5
    levels = np.unique(chance)
    cuts = np.concatenate([[0.0], (levels[:-1] + levels[1:]) / 2, [1.0]])
    widths = np.diff(np.concatenate([[0.0], levels, [1.0]]))
    yes, no = np.sort(chance[is_yes]), np.sort(chance[~is_yes])
    sensitivity = 1 - np.searchsorted(yes, cuts) / len(yes)
    specificity = np.searchsorted(no, cuts) / len(no)
    return float(cuts[np.lexsort((widths, np.round(sensitivity + specificity, 9)))[-1]])


def open_draws(truth: Sequence[str], answers: Sequence[str], weights: np.ndarray) -> Draws:
    """Open answers in normalized words, "" where one could not be resolved, per bootstrap draw.

    `accuracy` (the same words; unresolved is wrong), `macro_recall` (its mean over the true answers, so that a constant
    answer gets one over their number), `unresolved` (share), and `item_f1`, in which lists "a, b" count by their items.
    """
    right = np.array([a == b for a, b in zip(truth, answers, strict=True)], float)
    classes = (np.asarray(truth)[:, None] == np.unique(np.asarray(truth))).astype(float)  # (n, classes)
    recalls = ratio(weights @ (classes * right[:, None]), weights @ classes)
    lists = [(set(a.split(", ")), set(b.split(", ")) - {""}) for a, b in zip(truth, answers, strict=True)]
    shared, both = (weights @ np.array([[len(a & b), len(a) + len(b)] for a, b in lists], float)).T
    return {
        "accuracy": mean(right, weights),
        "macro_recall": np.ma.masked_invalid(recalls).mean(1).filled(np.nan),
        "unresolved": mean([answer == "" for answer in answers], weights),
        "item_f1": ratio(2 * shared, both),
    }


def probability_draws(
    truth: Sequence[bool], probability: Sequence[float], weights: np.ndarray, bins: int = 10
) -> Draws:
    """AUROC and expected calibration error of the probability of "yes", per bootstrap draw.

    AUROC counts a tie as half. ECE: the gap between mean probability and share of yes, averaged over `bins`
    equal-width bins by their size (Guo et al. 2017, arXiv 1706.04599).
    """
    is_yes, chance = np.asarray(truth, bool), np.asarray(probability, float)
    order = np.argsort(chance)
    starts = np.unique(chance[order], return_index=True)[1]
    ranked = weights[:, order]
    yes = np.add.reduceat(ranked * is_yes[order], starts, axis=1)
    no = np.add.reduceat(ranked * ~is_yes[order], starts, axis=1)
    below = no.cumsum(1) - no / 2  # "no" items ranked below each distinct probability, ties half
    gaps = np.where(_bin(chance, bins)[:, None] == np.arange(bins), (chance - is_yes)[:, None], 0)
    return {
        "auroc": ratio((yes * below).sum(1), yes.sum(1) * no.sum(1)),
        "ece": ratio(np.abs(weights @ gaps).sum(1), weights.sum(1)),
    }


def _bin(probability: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((probability * bins).astype(int), bins - 1)


def calibration_table(truth: Sequence[bool], probability: Sequence[float], bins: int = 10) -> pd.DataFrame:
    """One row per occupied bin: mean probability of "yes", share of yes, number of questions."""
    answers = pd.DataFrame({"probability": np.asarray(probability, float), "yes": np.asarray(truth, float)})
    grouped = answers.groupby(_bin(answers["probability"].to_numpy(), bins))
    return grouped.agg(probability=("probability", "mean"), yes=("yes", "mean"), n=("yes", "size"))
