"""The crash test of metrics: plant an error in a report, and see which metric notices.

A phantom study can be put in words as often as one likes (`phantom.reports`). Of each study there are a reference, a
candidate that says the same in other words, and the candidate once more with one error that a radiologist would mind;
everything else of it stays, word for word. A metric notices the error where the damaged candidate scores lower against
the reference than the candidate itself, by more than harmless words cost: by more than 95 % of the falls from the
candidate to a third wording of the same study. So a score raises a false alarm in at most 5 % of harmless cases, and
none wins by being touchy about words. Beside it stands the simple definition, any fall at all.

Counting a report's errors by kind follows the evaluation of report metrics by Yu et al. 2023 (Patterns 4, 100802). The
fact score reads the phantom's language with rules that were written in sight of it: what it reaches here is an upper
bound, what the others miss is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.data.reports import report_text
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.evaluation.facts import fact_counts
from lightmedvlm_utils.observations import LABELS, OPACITIES
from lightmedvlm_utils.phantom.patients import Finding, Study, sample_patients
from lightmedvlm_utils.phantom.phrases import impression_phrase, present_sentence
from lightmedvlm_utils.phantom.reports import findings_sentences, impression_items

NOTICED, LOWER = "noticed", "any fall"  # the two definitions
HARMLESS = "none (other words)"
FALSE_ALARMS = 0.05
_NORMAL = "No acute cardiopulmonary process."
_MIRROR = {"left": "right", "right": "left"}
_OTHER_ZONES = {
    "upper": ("lower",),
    "mid": ("upper", "lower"),
    "lower": ("upper",),
    "basal": ("apical",),
    "apical": ("basal",),
}
# What a denial calls a finding, where that is not its kind.
_PLAIN = {
    **dict.fromkeys(("linear atelectasis", "basal atelectasis", "lobar collapse"), "atelectasis"),
    **dict.fromkeys(("interstitial edema", "alveolar edema"), "pulmonary edema"),
    **dict.fromkeys(("multifocal pneumonia", "patchy pneumonia"), "pneumonia"),
    "lobar consolidation": "consolidation",
    "widened mediastinum": "mediastinal widening",
    "hazy opacity": "lung opacity",
    "apical cap": "pleural thickening",
}
_DENIALS = ("No {} is seen.", "There is no {}.", "There is no evidence of {}.")
_NO_CHANGE = (
    "Compared to the prior study, there is no significant change.",
    "No interval change since the previous radiograph.",
    "The appearance is unchanged from the prior examination.",
)


class Draft(NamedTuple):
    """A report before it is put together: each statement with the finding it is about, None where with none."""

    findings: list[tuple[str, Finding | None]]
    impression: list[tuple[str, Finding | None]]

    @property
    def text(self) -> str:
        sections = (" ".join(sentence for sentence, _ in part) for part in self)
        return report_text(*sections)


class Case(NamedTuple):
    """Four reports of one study: three that say the same in other words, and the second with an error planted."""

    reference: str
    candidate: str
    other: str
    damaged: str


def write_draft(study: Study, seed: Sequence[int]) -> Draft:
    """Put a study into words; the same seed chooses the same words for findings that differ in side, zone or size."""
    items = {impression_phrase(finding): finding for finding in reversed(study.findings)}
    impression = [(item, items[item]) for item in impression_items(study.findings)]
    return Draft(findings_sentences(study, np.random.default_rng(seed)), list(impression) or [(_NORMAL, None)])


def crash_cases(error: str, n: int, seed: int) -> list[Case]:
    """`n` cases of one kind of error (a name in ERRORS), each of another study that can have it."""
    cases: list[Case] = []
    patients = n
    while len(cases) < n:  # the first patients are the same however many are asked for
        patients *= 2
        cases = [case for _, case in zip(range(n), _cases(error, patients, seed), strict=False)]
    return cases


def _cases(error: str, patients: int, seed: int) -> Iterator[Case]:
    for study in _studies(patients, seed):
        reference, candidate, other = (write_draft(study, [seed, study.study_id, i]) for i in range(3))
        rng = np.random.default_rng([seed, study.study_id, 3, list(ERRORS).index(error)])
        damaged = ERRORS[error](_Scene(study, [seed, study.study_id, 1], candidate, rng))
        if damaged is not None:
            yield Case(reference.text, candidate.text, other.text, damaged.text)


@lru_cache(maxsize=4)
def _studies(patients: int, seed: int) -> list[Study]:
    return [study for patient in sample_patients(patients, seed) for study in patient.studies]


# ------------------------------------------------------------------------------------------------- metrics


def _fact_scores(references: Sequence[str], reports: Sequence[str]) -> np.ndarray:
    """F1 of facts, and the two flags that need no agreement: a contradiction, an invented prior."""
    counts = [fact_counts(*pair) for pair in zip(references, reports, strict=True)]
    return np.array([(_f1(2 * c.credit, c.expected + c.proposed), -c.contradictory, -c.invented_prior) for c in counts])


def _label_scores(references: Sequence[str], reports: Sequence[str]) -> np.ndarray:
    truth, guess = (metrics.positive(label_reports(texts)) for texts in (references, reports))
    hits, named = (truth & guess).sum(1), truth.sum(1) + guess.sum(1)
    return np.array([_f1(2 * hit, both) for hit, both in zip(hits, named, strict=True)])


def _f1(twice_right: float, named: float) -> float:
    return twice_right / named if named else 1.0  # two reports that name nothing agree


@lru_cache(maxsize=32)  # three metrics ask for the same texts, kind by kind of error
def _lexical(references: tuple[str, ...], reports: tuple[str, ...]) -> pd.DataFrame:
    return metrics.lexical_per_study(references, reports)


def _lexical_scores(name: str) -> Metric:
    return lambda references, reports: _lexical(tuple(references), tuple(reports))[name].to_numpy()


Metric = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # references, reports -> (n,) or (n, k), higher is better
METRICS: dict[str, Metric] = {
    "fact score": _fact_scores,
    "BLEU-4": _lexical_scores("bleu_4"),
    "ROUGE-L": _lexical_scores("rouge_l"),
    "CIDEr": _lexical_scores("cider"),
    "label F1": _label_scores,
}


def crash_table(n: int = 1000, seed: int = 0, tested: Mapping[str, Metric] = METRICS) -> pd.DataFrame:
    """Share of planted errors that each metric notices: a row per kind of error, columns (definition, metric).

    `n` reports per kind. Of a metric that gives several numbers per report a fall in one is enough; the fact score's
    are the F1 of facts and two flags, contradiction and invented prior. The last row has no error planted: its shares
    are false alarms.
    """
    cases = {error: crash_cases(error, n, seed) for error in ERRORS}
    shares = {(of, name): row for name, metric in tested.items() for of, row in _shares(cases, metric).items()}
    return pd.DataFrame(shares, index=pd.Index([*ERRORS, HARMLESS], name="error"))[[NOTICED, LOWER]]


def _shares(cases: Mapping[str, Sequence[Case]], metric: Metric) -> dict[str, list[float]]:
    """Share of cases, by definition, in which a metric falls: for each kind of error, then for harmless words."""
    falls, harmless = [], []
    for of_kind in cases.values():
        references = [case.reference for case in of_kind]
        candidate, other, damaged = (
            np.asarray(metric(references, list(texts)), float).reshape(len(of_kind), -1)
            for texts in list(zip(*of_kind, strict=True))[1:]
        )
        falls.append(candidate - damaged)
        harmless.append(candidate - other)
    falls.append(np.concatenate(harmless))
    usual = np.quantile(falls[-1], 1 - FALSE_ALARMS, axis=0, method="higher")
    least = {NOTICED: np.maximum(usual, 0), LOWER: np.zeros_like(usual)}
    return {name: [float((fall > bar + 1e-9).any(1).mean()) for fall in falls] for name, bar in least.items()}


# ------------------------------------------------------------------------------------------------ planting


class _Scene(NamedTuple):
    """What an error is planted into: a study, the seed of its words, the draft they make, and chance."""

    study: Study
    seed: Sequence[int]
    draft: Draft
    rng: np.random.Generator

    @property
    def shuffled(self) -> list[Finding]:
        return [self.study.findings[i] for i in self.rng.permutation(len(self.study.findings)).tolist()]

    def pick(self, choices: Sequence):
        return choices[int(self.rng.integers(len(choices)))]


def _change_one(scene: _Scene, change: Callable[[_Scene, Finding], Finding | None]) -> Draft | None:
    """The study in the same words with one finding changed; None where that cannot be read in the findings."""
    for finding in scene.shuffled:
        changed = change(scene, finding)
        if changed is None:
            continue
        findings = tuple(changed if old is finding else old for old in scene.study.findings)
        draft = write_draft(replace(scene.study, findings=findings), scene.seed)
        if [words for words, _ in draft.findings] != [words for words, _ in scene.draft.findings]:
            return draft
    return None


def _other_side(scene: _Scene, finding: Finding) -> Finding | None:
    """The mirrored side; one side of two. What is worded as of both lungs, whatever its side, stays."""
    if finding.kind in ("interstitial edema", "alveolar edema", "multifocal pneumonia") or not finding.side:
        return None
    return replace(finding, side=_MIRROR.get(finding.side) or scene.pick(("left", "right")))


def _other_zone(scene: _Scene, finding: Finding) -> Finding | None:
    if finding.zone not in _OTHER_ZONES or finding.label == "Pneumothorax":  # its zone is said or left out, no more
        return None
    return replace(finding, zone=scene.pick(_OTHER_ZONES[finding.zone]))


def _other_severity(scene: _Scene, finding: Finding) -> Finding | None:
    """Another of mild, moderate and severe; or a size half as large again, or a third smaller."""
    if finding.state == -1:
        return None
    if finding.label == "Lung Lesion":
        return replace(finding, size_mm=round(finding.measured_mm * scene.pick((1.5, 1 / 1.5))))
    levels = [level for level in (0.5, 0.7, 0.9) if abs(level - finding.severity) > 0.1]
    return replace(finding, severity=scene.pick(levels))


def _impression_without(scene: _Scene, finding: Finding) -> list[tuple[str, Finding | None]]:
    rest = [(item, of) for item, of in scene.draft.impression if of != finding]
    return rest or [(_NORMAL, None)]


def _denied(scene: _Scene, finding: Finding) -> str:
    return scene.pick(_DENIALS).format(_PLAIN.get(finding.kind, finding.kind))


def _alone(scene: _Scene, finding: Finding) -> bool:
    """Whether no other finding of the study goes by the same name: its absence would go unnoticed."""
    names = [_PLAIN.get(other.kind, other.kind) for other in scene.study.findings]
    return names.count(_PLAIN.get(finding.kind, finding.kind)) == 1


def _negate(scene: _Scene) -> Draft | None:
    for finding in filter(lambda finding: _alone(scene, finding), scene.shuffled):
        denial = _denied(scene, finding)
        findings = [(denial if of is finding else words, of) for words, of in scene.draft.findings]
        return Draft(findings, _impression_without(scene, finding))
    return None


def _omit(scene: _Scene) -> Draft | None:
    for finding in filter(lambda finding: _alone(scene, finding), scene.shuffled):
        findings = [(words, of) for words, of in scene.draft.findings if of is not finding]
        return Draft(findings, _impression_without(scene, finding))
    return None


def _invent(scene: _Scene) -> Draft | None:
    """Another patient's finding, of a label that the report does not speak of."""
    states = label_reports([scene.draft.text]).iloc[0]
    silent = {label for label in LABELS if np.isnan(states[label])}
    if "Lung Opacity" not in silent:
        silent -= {"Lung Opacity", *OPACITIES}
    strangers = _studies(500, scene.seed[0] + 1)
    foreign = [f for study in strangers for f in study.findings if f.state == 1 and f.label in silent]
    if not foreign:
        return None
    finding = scene.pick(foreign)
    findings, impression = list(scene.draft.findings), [pair for pair in scene.draft.impression if pair[1]]
    findings.insert(int(scene.rng.integers(len(findings) + 1)), (present_sentence(finding, scene.rng), finding))
    if finding.label != "Support Devices":
        impression.append((impression_phrase(finding), finding))
    return Draft(findings, impression or scene.draft.impression)


def _compare(scene: _Scene) -> Draft:
    """A comparison with a prior that there is not: of one finding, or of the whole."""
    findings, impression = list(scene.draft.findings), list(scene.draft.impression)
    stated = [i for i, (_, of) in enumerate(findings) if of and of.state == 1 and of.label != "Support Devices"]
    listed = [i for i, (_, of) in enumerate(impression) if of and of.state == 1]
    how = scene.pick(("sentence", "apposition", "new", "whole")) if stated else "whole"
    if how == "sentence":
        at = scene.pick(stated)
        finding = findings[at][1]
        change = scene.pick(("new", "unchanged", "increased", "decreased"))
        findings[at] = (present_sentence(finding, scene.rng, change), finding)
    elif how == "apposition":
        at = scene.pick(stated)
        words, finding = findings[at]
        since = scene.pick(("unchanged", "as before", "stable since the prior film"))
        findings[at] = (f"{words[:-1]}, {since}.", finding)
    elif how == "new" and listed:
        at = scene.pick(listed)
        words, finding = impression[at]
        impression[at] = (f"New {words[0].lower()}{words[1:]}", finding)
    else:
        findings.append((scene.pick(_NO_CHANGE), None))
    return Draft(findings, impression)


def _contradict(scene: _Scene) -> Draft | None:
    """Deny in one place what is asserted in another, or give it the other side in the impression."""
    for finding in filter(lambda finding: finding.state == 1 and _alone(scene, finding), scene.shuffled):
        findings, impression = list(scene.draft.findings), list(scene.draft.impression)
        listed = [i for i, (_, of) in enumerate(impression) if of == finding]
        ways = ["deny", *(["deny there"] if listed else []), *(["side"] if listed and finding.side in _MIRROR else [])]
        how = scene.pick(ways)
        if how == "side":
            impression[listed[0]] = (impression_phrase(replace(finding, side=_MIRROR[finding.side])), finding)
        elif how == "deny there":
            impression[listed[0]] = (_denied(scene, finding), None)
        else:
            findings.insert(int(scene.rng.integers(len(findings) + 1)), (_denied(scene, finding), None))
        return Draft(findings, impression)
    return None


ERRORS: dict[str, Callable[[_Scene], Draft | None]] = {
    "side": lambda scene: _change_one(scene, _other_side),
    "negation": _negate,
    "omission": _omit,
    "invention": _invent,
    "severity": lambda scene: _change_one(scene, _other_severity),
    "zone": lambda scene: _change_one(scene, _other_zone),
    "prior": _compare,
    "contradiction": _contradict,
}
