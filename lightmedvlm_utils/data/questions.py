"""Questions about studies, from their labels and reports, balanced so that a question does not betray its answer.

Closed questions are answered by yes or no, as many "yes" as "no" for every label: whoever ignores the image gets half
of them right, whatever is asked. Open ones are answered in a few words from a small list, the rarer answers as often as
the commoner ones where the studies allow it. The wordings come from `wordings.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.facts import Fact, read_facts
from lightmedvlm_utils.data.wordings import DEVICES, KINDS, wordings
from lightmedvlm_utils.errors import UserError, no_such
from lightmedvlm_utils.observations import CHILDREN, LABELS

# The plainest wordings of each label's question, the plainest first.
QUESTIONS: dict[str, tuple[str, ...]] = {
    label: wordings("normality" if label == "No Finding" else "presence", label).known for label in LABELS
}
COLUMNS = ["study_id", "kind", "label", "subject", "value", "negated", "question", "answer", "closed", "synthetic"]

_NEGATED = 4  # every fourth pair of closed questions asks for the absence
_MOST_REPEATS = 3  # a rare label's positive study is asked at most so often, each time in other words
# How the budget is shared: most to the 14 labels, the rest to what else there is to ask.
_SHARES = {"presence": 0.6, "side": 0.15, "zone": 0.06, "severity": 0.06, "view": 0.04, "device": 0.06, "count": 0.03}
# Zones as reports name them, and as they are asked for.
_ZONES = {"upper": "upper", "apical": "upper", "mid": "middle", "lower": "lower", "basal": "lower"}
_NUMBERS = ("none", "one", "two", "three", "four", "five")
ANSWERS: dict[str, tuple[str, ...]] = {
    "side": ("left", "right", "both sides"),
    "zone": ("upper", "middle", "lower"),
    "severity": ("minimal", "mild", "moderate", "severe", "tiny", "small", "large"),
    "view": ("PA", "AP"),
    "device": ("none", *DEVICES),
    "count": _NUMBERS,
}


def build_questions(
    studies: pd.DataFrame,
    per_study: float,
    seed: int,
    synthetic_minority: bool = False,
    kinds: Sequence[str] = KINDS,
) -> pd.DataFrame:
    """Questions with their answers: DataFrame of COLUMNS, in known wordings only.

    `studies` holds study_id and the 14 label columns; `report` and `images` where sides, zones, severities, devices,
    counts and views are asked too (without them these kinds are left out). Closed: "yes" is state 1; "no" is state 0
    and, only as far as needed, a blank (not mentioned); uncertain states are never asked; every fourth pair is negated
    ("Is there no ...?"). Open answers are what the report says (ANSWERS; devices as a list "a, b" in the order of
    `wordings.DEVICES`), never where it says nothing, hedges or says two things. On average at most `per_study`
    questions a study; where the budget binds, the most frequent labels and answers give way first.

    `synthetic_minority` adds questions about the labels that have fewer than the others: their positive studies asked
    in other words, and as many new negative ones (the thesis' third stage). The result depends on the studies and on
    `seed`, not on the order of the rows. Raises UserError if a label column is missing or a kind unknown.
    """
    missing = [label for label in LABELS if label not in studies]
    if missing:
        raise UserError(f"The study table has no column {', '.join(missing)}; run notebook 01 first.")
    for kind in kinds:
        if kind not in KINDS:
            raise no_such("kind of question", kind, KINDS)
    studies = studies.drop_duplicates("study_id").sort_values("study_id", ignore_index=True)
    rows = _label_questions(studies, per_study, seed, synthetic_minority, kinds)
    for kind, stated in stated_answers(studies, kinds).items():
        rng = np.random.default_rng([seed, len(LABELS) + KINDS.index(kind)])
        rows += _property_questions(kind, stated, int(_SHARES[kind] * per_study * len(studies)), rng)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.sort_values(["study_id", "kind", "label", "question"], ignore_index=True)


def reword(questions: pd.DataFrame, seed: int, held_out: bool = True) -> pd.Series:
    """Each question of `build_questions` in other words: a held-out wording, or another known one."""
    rng = np.random.default_rng(seed)
    texts = []
    for row in questions.itertuples():
        choices = wordings(row.kind, row.subject, row.value, row.negated)[held_out]
        texts.append(str(rng.choice([text for text in choices if text != row.question])))
    return pd.Series(texts, index=questions.index, name="question")


_OPEN = re.compile(
    r"\W*(?:(?:on|in|at|from|to|of|with|please|(?:can|could|would) you(?: please)?)\s+)?"
    r"(?:what|which|where|how|who|why|when|list|name|specify|enumerate|describe|state|tell|identify|indicate|give|provide)\b",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\b(?:left|right|upper|middle|lower|pa|ap|frontal|lateral)\b,?(?: \w+){0,3} or\b", re.I)


def is_closed(question: str) -> bool:
    """Whether a question asks for yes or no: it does not ask what, where or how much, and offers no choice.

    >>> [is_closed(q) for q in ("Is there an effusion?", "Effusion?", "Is it left or right?", "Can you list them?")]
    [True, True, False, False]
    """
    return not _OPEN.match(question) and not _CHOICE.search(question)


_SAID = {
    "side": {"both sides": r"both|bilateral\w*", "left": r"left", "right": r"right"},
    "zone": {
        "upper": r"upper|apex|apices|apical|top",
        "middle": r"mid|middle|lingula",
        "lower": r"lower|bas\w+|bottom",
    },
    "severity": {word: word for word in ANSWERS["severity"]},
    "view": {"PA": r"pa|posteroanterior", "AP": r"ap|anteroposterior"},
    "count": {word: rf"{word}|{number}" for number, word in enumerate(_NUMBERS)},
}
_SAID["count"]["none"] += "|no|zero"
_SAID_COMPILED = {kind: {a: re.compile(rf"\b(?:{p})\b", re.I) for a, p in said.items()} for kind, said in _SAID.items()}
_NAMES = dict.fromkeys(("none", "no device", "no devices"), "none")
_NAMES |= {re.sub(r"^an? ", "", noun): device for device, nouns in DEVICES.items() for noun in (device, *nouns)}


def normalize_answer(kind: str, answer: str) -> str:
    """A generated open answer as one of ANSWERS (devices: a list of them), or "" where it names none or two of them:
    it is then unresolved, and nobody guesses what was meant.

    >>> normalize_answer("side", "On the left side."), normalize_answer("side", "left or right")
    ('left', '')
    """
    if kind == "device":
        items = [re.sub(r"^(?:an?|the) ", "", item.strip(" .")) for item in re.split(r",|\band\b", answer.lower())]
        found = {_NAMES.get(item, "") for item in items if item}
        return _device_list(found) if found == {"none"} or (found and not found & {"", "none"}) else ""
    found = {name for name, pattern in _SAID_COMPILED.get(kind, {}).items() if pattern.search(answer)}
    if kind == "side" and "both sides" in found:
        found = {"both sides"}
    return found.pop() if len(found) == 1 else ""


def normalize_answers(questions: pd.DataFrame, answers: Sequence[str]) -> list[str]:
    """The answers to `questions` in ANSWERS' words: yes and no as they are, open ones by `normalize_answer`."""
    rows = zip(questions["kind"], questions["closed"], answers, strict=True)
    return [answer if closed else normalize_answer(kind, answer) for kind, closed, answer in rows]


def _device_list(devices: Iterable[str]) -> str:
    chosen = set(devices)
    return ", ".join(device for device in DEVICES if device in chosen) or "none"


# ------------------------------------------------------------------------------------------ the 14 labels


def _label_questions(
    studies: pd.DataFrame, per_study: float, seed: int, synthetic_minority: bool, kinds: Sequence[str]
) -> list[tuple]:
    """Yes/no questions about the labels: presence, and normality for No Finding."""
    asked = [label for label in LABELS if _kind(label) in kinds]
    candidates = {label: _Candidates(studies, label, seed) for label in asked}
    pairs = {label: found.most_pairs for label, found in candidates.items()}
    share = _SHARES["presence"] if set(kinds) & set(_ABOUT) and "report" in studies else 1
    level = _water_level(list(pairs.values()), int(share * per_study * len(studies) / 2))
    rows = []
    for label, found in candidates.items():
        natural = min(pairs[label], level)
        total = min(level, found.most_synthetic_pairs) if synthetic_minority else natural
        rows += found.ask(natural, total)
    return rows


def _kind(label: str) -> str:
    return "normality" if label == "No Finding" else "presence"


def _water_level(counts: Sequence[int], budget: int) -> int:
    """The largest cap for which sum(min(counts, cap)) stays within the budget, at most max(counts)."""
    levels = np.arange(max(counts, default=0) + 1)
    totals = np.minimum(np.array(counts, int)[:, None], levels).sum(axis=0)
    return int(levels[totals <= budget][-1])


class _Candidates:
    """The studies that can be asked about one label, in a random order that the seed fixes."""

    def __init__(self, studies: pd.DataFrame, label: str, seed: int):
        self.label = label
        rng = np.random.default_rng([seed, LABELS.index(label)])
        ids, state = studies["study_id"].to_numpy(), studies[label].to_numpy(dtype=float)
        # A report that names a child speaks of the parent too, so the parent's blank is then no clear "no".
        children = studies[list(CHILDREN.get(label, ()))].to_numpy(dtype=float)
        blank = np.isnan(state) & ~(np.isin(children, (1, -1)).any(axis=1))
        self.yes = rng.permutation(ids[state == 1])
        explicit, unmentioned = ids[state == 0], ids[blank]
        self.no = np.concatenate([rng.permutation(explicit), rng.permutation(unmentioned)])
        self.start = dict(zip(ids.tolist(), rng.integers(2**31, size=len(ids)).tolist(), strict=True))

    @property
    def most_pairs(self) -> int:
        return min(len(self.yes), len(self.no))

    @property
    def most_synthetic_pairs(self) -> int:
        """Each positive study can be asked so often, in other words; negatives are not repeated."""
        return min(len(self.yes) * _MOST_REPEATS, len(self.no))

    def ask(self, natural: int, total: int) -> list[tuple]:
        """`total` yes/no pairs, of which those after the first `natural` are synthetic."""
        rows = []
        for index in range(total):
            round_, position = divmod(index, max(len(self.yes), 1))
            negated = (index + round_) % _NEGATED == 0
            for study_id, present in ((self.yes[position], True), (self.no[index], False)):
                choices = wordings(_kind(self.label), self.label, negated=negated).known
                wording = choices[(self.start[int(study_id)] + round_) % len(choices)]
                answer = "yes" if present != negated else "no"
                kind = _kind(self.label)
                rows.append(
                    (int(study_id), kind, self.label, self.label, "", negated, wording, answer, True, index >= natural)
                )
        return rows


# ------------------------------------------------------------------------------------------ the other kinds


class Stated(NamedTuple):
    """What a study says about one property of `subject` (a label or a device; "" for the image as a whole)."""

    study_id: int
    kind: str
    label: str
    subject: str
    answer: str

    @property
    def group(self) -> tuple[str, str]:
        """What is to be equally frequent: answers, and of lists their lengths."""
        return self.subject, str(self.answer.count(",")) if ", " in self.answer else self.answer


def stated_answers(studies: pd.DataFrame, kinds: Iterable[str]) -> dict[str, list[Stated]]:
    """Every open answer that the studies give, by kind, in ANSWERS' words: from their reports, or (view) images.

    A property is left out where the report does not name it, hedges the finding or says two things; a kind, where the
    studies have no column `report` (view: `images`) or nothing open is asked of it.
    """
    found: dict[str, list[Stated]] = {
        kind: [] for kind in kinds if kind in _ABOUT and ("images" if kind == "view" else "report") in studies
    }
    if "view" in found:
        first = [images[0]["view"] if len(images) else "" for images in studies["images"]]
        pairs = zip(studies["study_id"], first, strict=True)
        found["view"] = [Stated(int(study), "view", "", "", view) for study, view in pairs if view in ANSWERS["view"]]
    for study_id, report in zip(studies["study_id"], studies["report"], strict=True) if found.keys() - {"view"} else ():
        by_label: dict[str, list[Fact]] = {}
        for fact in read_facts(report):
            if fact.state != "absent":
                by_label.setdefault(fact.finding, []).append(fact)
        for kind, stated in found.items():
            for label in _ABOUT[kind]:
                answer = _answer(kind, by_label.get(label, []))
                if answer:
                    stated.append(Stated(int(study_id), kind, label, "" if kind == "device" else label, answer))
    return found


def _answer(kind: str, facts: list[Fact]) -> str:
    """The open answer that the facts about one label give, "" for none."""
    if any(fact.state != "present" for fact in facts):
        return ""
    if kind == "device":
        known = all(fact.kind in DEVICES for fact in facts)
        return _device_list(fact.kind for fact in facts) if known else ""
    if kind == "count":
        return _count(facts)
    values = {_PROPERTY[kind](fact) for fact in facts} - {""}
    return values.pop() if len(values) == 1 else ""


def _count(facts: list[Fact]) -> str:
    """How many things of one label the fuller of a report's sections names, "" where that is no number."""
    section = "findings" if any(fact.section == "findings" for fact in facts) else "impression"
    things = {(fact.kind, fact.side, fact.zone, fact.size_mm) for fact in facts if fact.section in (section, "")}
    countable = len(things) < len(_NUMBERS) and all(fact.side != "both" for fact in facts)
    return _NUMBERS[len(things)] if countable else ""


_PROPERTY: dict[str, Callable[[Fact], str]] = {
    "side": lambda fact: {"both": "both sides"}.get(fact.side, fact.side),
    "zone": lambda fact: _ZONES.get(fact.zone, ""),
    "severity": lambda fact: fact.grade if fact.grade in ANSWERS["severity"] else "",
}
# The labels whose properties are asked.
_ABOUT: dict[str, tuple[str, ...]] = {
    "side": ("Atelectasis", "Consolidation", "Fracture", "Lung Lesion", "Lung Opacity", "Pleural Effusion",
             "Pleural Other", "Pneumonia", "Pneumothorax"),
    "zone": ("Atelectasis", "Consolidation", "Lung Lesion", "Lung Opacity", "Pneumonia"),
    "severity": ("Atelectasis", "Cardiomegaly", "Edema", "Enlarged Cardiomediastinum", "Pleural Effusion",
                 "Pneumothorax"),
    "device": ("Support Devices",),
    "count": ("Fracture", "Lung Lesion", "Support Devices"),
    "view": (),
}  # fmt: skip
_OPPOSITE = {"left": "right", "right": "left", "AP": "PA", "PA": "AP"}


def _property_questions(kind: str, stated: list[Stated], budget: int, rng: np.random.Generator) -> list[tuple]:
    """Open questions of a kind and, for sides, views and devices, as many closed ones."""
    half = budget // 2 if kind in ("side", "view", "device") else budget
    rows = [_row(found, "", found.answer, rng) for found in _capped(stated, half, rng)]
    if kind == "device":
        return rows + _device_pairs(stated, half, rng)
    two_sided = [found for found in stated if found.answer in _OPPOSITE] if half < budget else []
    for number, found in enumerate(_capped(two_sided, half, rng)):
        value = found.answer if number % 2 else _OPPOSITE[found.answer]
        rows.append(_row(found, value, "yes" if value == found.answer else "no", rng))
    return rows


def _device_pairs(stated: list[Stated], budget: int, rng: np.random.Generator) -> list[tuple]:
    """Whether there is a device of a kind: as many yes as no for each."""
    rows = []
    order = [stated[i] for i in rng.permutation(len(stated))]
    for device in DEVICES:
        has, has_not = ([s for s in order if (device in s.answer.split(", ")) == there] for there in (True, False))
        for index, pair in enumerate(list(zip(has, has_not, strict=False))[: budget // (2 * len(DEVICES))]):
            negated = index % _NEGATED == 0
            for found, present in zip(pair, (True, False), strict=True):
                answer = "yes" if present != negated else "no"
                rows.append(_row(found._replace(subject=device), "", answer, rng, negated))
    return rows


def _capped(stated: list[Stated], budget: int, rng: np.random.Generator) -> list[Stated]:
    """At most `budget` of them; the commoner answers about a subject give way to the rarer ones."""
    groups: dict[tuple[str, str], list[Stated]] = {}
    for index in rng.permutation(len(stated)):
        groups.setdefault(stated[index].group, []).append(stated[index])
    level = _water_level([len(group) for group in groups.values()], budget)
    return [found for key in sorted(groups) for found in groups[key][:level]]


def _row(about: Stated, value: str, answer: str, rng: np.random.Generator, negated: bool = False) -> tuple:
    question = str(rng.choice(wordings(about.kind, about.subject, value, negated).known))
    closed = answer in ("yes", "no")
    return (*about[:4], value, negated, question, answer, closed, False)
