"""How the words of reports are compared: our protocol, "study", and "r2gen", by which published tables are made.

"study": words as in `metrics.words` (lower case; headings and punctuation removed, measurements whole), the whole
reference, one reference a study; the whole report and each of its sections, over the studies that have it.

"r2gen": what the R2Gen family does (Chen et al. 2020, arXiv 2010.16056, and its code), so that a number stands beside
theirs: the findings alone, cleaned by a recipe that also damages what it cleans (see `R2Gen.words`), rare words
replaced and references cut short, in MIMIC-CXR a study counted as often as it has images. Rare words and the ends of
long reports are no part of the task, and every full stop is a word to be hit: the same reports have a higher BLEU and
ROUGE-L than in "study". Two differences remain. R2Gen reads findings as they are in the files, so give references that
keep their de-identification tokens (deid="keep" in notebook 01), and of Open-i the studies with two images, which are
all it has. And its models write a report an image, where ours writes one a study, which counts for each image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lightmedvlm_utils.data.reports import TARGETS, split_report
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.evaluation.bootstrap import PROTOCOL

WHOLE = "+".join(TARGETS)  # the section of records on whole reports
UNKNOWN = "<unk>"  # cleaning takes < and > out, so no report can write it

Style = Literal["mimic", "iu"]


class Where(NamedTuple):
    """What a record says about the items behind its number: `n` of them, each one `unit`."""

    protocol: str
    section: str
    unit: str
    n: int


class Comparison(NamedTuple):
    """What one protocol compares: item i is study `rows[i]` (a study may occur more than once) with the text
    `references[i]`, and with the text that `hypothesis` makes of a whole report; `tokenize` finds the words of both."""

    where: Where
    rows: np.ndarray
    references: list[str]
    hypothesis: Callable[[str], str]
    tokenize: metrics.Tokenize

    def hypotheses(self, reports: Sequence[str]) -> list[str]:
        """The items' texts of one system, from its whole reports, one a study."""
        texts = [self.hypothesis(report) for report in reports]
        return [texts[row] for row in self.rows]


def study_comparisons(references: Sequence[str], section: str = WHOLE) -> list[Comparison]:
    """Protocol "study" on reports as they are and, where they are whole reports, on each section that some have.

    A generated report without the section is compared as an empty one.
    """
    rows = np.arange(len(references))
    found = [Comparison(Where(PROTOCOL, section, "study", len(rows)), rows, list(references), str, metrics.words)]
    for name in TARGETS if section == WHOLE else ():
        text_of = _section(name)
        texts = [text_of(report) for report in references]
        rows = np.flatnonzero([text != "" for text in texts])
        if len(rows):
            where = Where(PROTOCOL, name, "study", len(rows))
            found.append(Comparison(where, rows, [texts[row] for row in rows], text_of, metrics.words))
    return found


def _section(name: str) -> Callable[[str], str]:
    return lambda report: split_report(report)[name]


_findings = _section("findings")


class _Recipe(NamedTuple):
    """R2Gen's handling of one data set: `clean` lists what is replaced by what, how many times over."""

    clean: tuple[tuple[str, str, int], ...]
    threshold: int
    length: int
    unit: str


# Item numbers, wherever the characters stand: "T11. No" has one, too.
_NUMBERS = (("1. ", "", 1), *((f". {k}. ", ". ", 1) for k in range(2, 6)), *((f" {k}. ", ". ", 1) for k in range(2, 6)))
_RECIPES: dict[str, _Recipe] = {
    "mimic": _Recipe((("\n", " ", 1), ("__", "_", 7), ("  ", " ", 6), ("..", ".", 8), *_NUMBERS), 10, 100, "image"),
    "iu": _Recipe((("..", ".", 3), *_NUMBERS), 3, 60, "study"),
}
# R2Gen's character class has the range from ":" to "[" where a hyphen was meant: hyphens stay, "<=>@" go.
_DROPPED = str.maketrans("", "", ".,?;*!%^&_+():<=>@[]{}\"'/\\")


class R2Gen:
    """R2Gen's texts for one data set, "mimic" or "iu".

    `train_reports`, whole reports, decide which words are known: those that occur in their findings at least 10
    (MIMIC-CXR) or 3 times (IU). R2Gen counts a MIMIC report once for each of its images: give it as often. With far
    fewer reports than it had (a small run), most words are unknown and the protocol says little.
    """

    def __init__(self, style: Style, train_reports: Sequence[str]):
        if style not in _RECIPES:
            raise UserError(f"r2gen_style is {style!r}; use 'mimic' or 'iu'.")
        self.recipe = _RECIPES[style]
        counts = Counter(word for report in train_reports for word in self.words(_findings(report)))
        if not counts:
            raise UserError("No training report has findings, so protocol r2gen has no vocabulary.")
        self.vocabulary = {word for word, count in counts.items() if count >= self.recipe.threshold}

    def words(self, findings: str) -> list[str]:
        """Words after R2Gen's cleaning; each sentence ends in the word ".". No text, no words.

        The recipe takes every "1. " for an item number and every dot for punctuation. So measurements lose their
        decimal point, and numbers that end a sentence their digit and the sentence its end.

        >>> R2Gen("iu", ["Clear."]).words("A 1.2-cm nodule, compression of T11. No PTX.")
        ['a', '12-cm', 'nodule', 'compression', 'of', 't1no', 'ptx', '.']
        """
        if not findings.strip():
            return []
        for old, new, times in self.recipe.clean:
            for _ in range(times):
                findings = findings.replace(old, new)
        sentences = [sentence.translate(_DROPPED) for sentence in findings.strip().lower().split(". ")]
        return f"{' . '.join(sentences)} .".split()

    def reference(self, report: str) -> str:
        """A reference as it comes back from R2Gen's ids: rare words are "<unk>", and of the 100 (IU: 60) places the
        start token has taken one."""
        known = [word if word in self.vocabulary else UNKNOWN for word in self.words(_findings(report))]
        return " ".join(known[: self.recipe.length - 1])

    def hypothesis(self, report: str) -> str:
        """A generated report, cut where R2Gen's decoder stops: after 100 (IU: 60) words.

        Its decoder knows no word outside the vocabulary. Other models do, and such a word stays as it is: it matches
        nothing, since a reference has "<unk>" in its place. So no credit is given for any rare word in place of
        another, and BLEU and ROUGE-L are at most what they would be with "<unk>" on both sides.
        """
        return " ".join(self.words(_findings(report))[: self.recipe.length])

    def comparison(self, references: Sequence[str], images: Sequence[int] | None = None) -> Comparison:
        """The studies whose reference has findings; in MIMIC-CXR each as often as `images` says.

        Raises UserError without `images` for MIMIC-CXR, or where no reference has findings and an image.
        """
        times = np.array([_findings(report) != "" for report in references], int)
        if self.recipe.unit == "image":
            times *= _checked(images, len(references))
        if not times.any():
            raise UserError("No reference has findings (and an image), so protocol r2gen has nothing to compare.")
        rows = np.repeat(np.arange(len(references)), times)
        texts = [self.reference(report) for report in references]
        where = Where("r2gen", "findings", self.recipe.unit, len(rows))
        return Comparison(where, rows, [texts[row] for row in rows], self.hypothesis, str.split)

    def clipping_draws(self, references: Sequence[str], weights: np.ndarray) -> metrics.Draws:
        """What the protocol takes off the task: the share of the references' words that are unknown, and of the
        references that are cut, per bootstrap draw."""
        kept = [self.reference(report).split() for report in references]
        length = np.array([len(self.words(_findings(report))) for report in references])
        unknown = np.array([words.count(UNKNOWN) for words in kept])
        count = np.array([len(words) for words in kept])
        return {
            "unknown_ratio": weights @ unknown / (weights @ count),
            "truncated_ratio": weights @ (length > count) / weights.sum(1),
        }


def _checked(images: Sequence[int] | None, studies: int) -> np.ndarray:
    if images is None:
        raise UserError("Protocol r2gen counts images in MIMIC-CXR: give `images`, the number of images of each study.")
    counts = np.asarray(images)
    if counts.shape != (studies,) or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise UserError(f"`images` must hold one number of images, 0 or more, for each of the {studies} studies.")
    return counts
