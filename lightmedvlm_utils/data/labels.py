"""Labels from report text by rules, in CheXpert's manner: mention, negation, uncertainty, aggregation.

One table, `RULES`, holds every phrase; to teach the labeler a phrase, add a line there. The approach follows
Irvin et al. 2019 (CheXpert) and Chapman et al. 2001 (NegEx); the phrases and the code are our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.parallel import map_chunks
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS, OPACITIES

PRESENT, ABSENT, UNCERTAIN = 1.0, 0.0, -1.0


class Rule(NamedTuple):
    """Regular expressions (on lower-case text) for one label."""

    mentions: tuple[str, ...]  # assert the finding, unless negated or hedged
    hints: tuple[str, ...] = ()  # make it uncertain, unless negated
    normals: tuple[str, ...] = ()  # deny it in positive words


_NORMAL = r"(?:normal|unremarkable|not enlarged|not widened)"
_HEART = r"(?:heart|cardiac)"
_BIG = r"(?:enlarge\w*|widen\w*|prominen\w*)"
RULES: dict[str, Rule] = {
    "Atelectasis": Rule(
        (r"atelecta\w*", r"\b(?:lobe|lobar|lung)\b.{0,12}\bcollapsed?\b", r"\bcollapse of the (?:left|right)\b")
    ),
    "Cardiomegaly": Rule(
        (
            rf"cardiomegaly|\b{_HEART}\b[^.,;]{{0,35}}\b{_BIG}|{_BIG}(?: of)?(?: the)? {_HEART}",
            r"\bheart (?:size )?(?:is |appears )(?:\w+ )?large\b",
        ),
        hints=(
            rf"\b{_HEART}\b[^.,;]{{0,35}}\b(?:borderline|upper limits?|top[- ]normal)",
            rf"\b(?:borderline|upper limits? of normal) {_HEART}",
        ),
        normals=(
            rf"\b(?:heart|cardiac|cardiomediastinal)\b[^.;]{{0,60}}{_NORMAL}",
            r"\bnormal (?:in size |size |appearance )?(?:of )?(?:the )?(?:heart|cardiac|cardiomediastinal)",
        ),
    ),
    "Consolidation": Rule((r"consolidat\w*",)),
    "Edema": Rule(
        (
            r"(?<!soft tissue )\bo?edema",
            r"\b(?:vascular|venous|pulmonary) (?:congestion|engorgement)|cephalization",
            r"\bheart failure|\bchf\b|\b(?:fluid|volume) overload",
        )
    ),
    "Enlarged Cardiomediastinum": Rule(
        (rf"mediastin\w*[^.,;]{{0,35}}{_BIG}|{_BIG}[^.,;]{{0,25}}mediastin\w*",),
        hints=(r"mediastin\w*[^.,;]{0,35}\b(?:borderline|upper limits?)",),
        normals=(rf"mediastin\w*[^.;]{{0,50}}{_NORMAL}", r"\bnormal[^.,;]{0,30}mediastin\w*"),
    ),
    "Fracture": Rule(
        (r"\bfractur\w*",),
        normals=(r"\b(?:bones|bony structures|osseous structures|bony thorax)\b[^.,;]{0,25}\bintact",),
    ),
    "Lung Lesion": Rule(
        (
            r"\bnodul\w*|\b(?<!mediastinal )mass(?:es)?\b(?! effect)",
            r"\b(?:cavitary|lung|pulmonary) lesions?\b|\b(?:neoplas\w*|carcinoma|tumou?r|malignan\w*|metasta\w*)",
        )
    ),
    "Lung Opacity": Rule(
        (
            r"\bopaci\w*|\binfiltrat\w*|\bair[- ]?space (?:disease|process)",
            r"\binterstitial (?:markings?|pattern|prominence|thickening|lung disease|disease)|\breticul\w*",
            r"\bincreased (?:density|markings)|\bscarring\b|\bperibronchial (?:thickening|cuffing)",
        ),
        normals=(
            r"\blung(?:s| fields)\b(?: \w+){0,3} clear\b(?! of\b)",
            r"\bclear lungs?\b|\blungs clear\b(?! of\b)",
        ),
    ),
    "Pleural Effusion": Rule(
        (r"(?<!pericardial )\beffusions?\b|\bpleural fluid|\bhydro(?:pneumo)?thora\w*",),
        hints=(r"\bblunt\w*[^.;]{0,40}(?:costophrenic|sulc|cp angle)|costophrenic[^.;]{0,40}\bblunt\w*",),
        normals=(r"\bcostophrenic[^.;]{0,30}\b(?:sharp|clear)|\bpleural spaces?\b[^.;]{0,20}\b(?:clear|normal)",),
    ),
    "Pleural Other": Rule(
        (
            r"\bpleural?\b[^.,;]{0,25}\b(?:thicken\w*|scar\w*|plaques?|capp?\w*|calcif\w*)|\bfibrothorax",
            r"\b(?:thicken\w*|scarring) of the (?:\w+ )?pleura|\bapical cap|\bfissur\w* thickening",
        )
    ),
    "Pneumonia": Rule((r"(?:broncho)?pneumonia\w*|\binfecti\w*|\bpneumonitis",)),
    "Pneumothorax": Rule((r"\b(?:hydro)?pneumothora\w*|\bptx\b",)),
    "Support Devices": Rule(
        (
            r"\btubes?\b|\bcatheters?\b|\bpicc\b|\bpace ?makers?\b|\bpacer\b|\bdefibrillator|\bicd\b|\bleads?\b",
            r"\b(?:central|venous|jugular|ij|subclavian|support|monitoring) lines?\b|\blines? and tubes",
            r"\bsternotomy|\bwires?\b|\b(?:surgical )?clips?\b",
            r"\b(?:mechanical|prosthetic|replacement) valve|\bvalve replacement",
            r"\bport\b|\bport-?a-?cath|\bmediport|\bstents?\b|\btracheostomy|\bhardware|\bstimulator",
            r"\bsupport (?:and monitoring )?devices?|\bdobb?hoff|\bswan-ganz|\bballoon pump",
        )
    ),
}

# A negation or hedge reaches to the end of its clause. These words open a new one.
_CLAUSE = re.compile(
    r"[;:]|\b(?=(?:but|however|although|though|except|apart from|aside from|other than|whereas|while|which|"
    r"there (?:is|are)|otherwise)\b)"
    r"|, (?=(?:(?:and )?(?:a |an )?(?:tiny|small|moderate|large|mild|minimal|stable|unchanged|new|persistent)\b)"
    r"(?!.*(?:\b(?:or|nor)\b|/)))"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])|(?<=[a-z]\.)(?=[A-Z][a-z])|\n+")
_NO_CHANGE = re.compile(r"\b(?:no|without|not)(?: \w+){0,2} (?:changed?|difference)\b(?: (?:in|of|from)\b)?")

_NEGATION_BEFORE = re.compile(
    r"\b(?:no|not|without|never|neither|nor|absen(?:t|ce of)|negative for|free of|clear of|den(?:y|ies)|"
    r"rather than|resolved|resolution of|removal of|removed|interval removal)\b"
)
_NEGATION_AFTER = re.compile(
    r"^[^.,;]{0,40}?\b(?:(?:not|no longer) (?:\w+ )?(?:seen|identified|present|visuali[sz]ed|appreciated|evident|"
    r"noted|demonstrated|detected|visible)|(?:has|have) (?:now |since )?(?:resolved|cleared|been removed)|"
    r"(?:is|are) (?:now )?(?:absent|unlikely|excluded|resolved|removed)|ruled out)\b"
)
# These contain a "not" that does not deny: they are looked for first.
_OPEN_BEFORE = re.compile(
    r"\b(?:cannot|can not|could not|not|difficult to|impossible to) (?:\w+ )?(?:exclude|rule out)\b"
)
_OPEN_AFTER = re.compile(
    r"^[^.;]{0,60}?\b(?:(?:cannot|can not|could not|not) (?:be )?(?:\w+ )?(?:excluded|ruled out)|not excluded)\b"
)
_HEDGE_BEFORE = re.compile(
    r"\b(?:possibl[ey]|possibility|probabl[ey]|question(?:able|ed)?|suspect\w*|suspicio\w+|may|might|could|borderline|"
    r"equivocal|likely|presum\w+|concern\w*|worrisome|versus|vs|suggest\w*|potential\w*|perhaps|consider\w*|"
    r"differential|rule out|r/o|evaluate for)\b"
)
_HEDGE_AFTER = re.compile(
    r"^[^.,;]{0,60}?\b(?:(?:may|might|could) (?:also )?be present|(?:is|are) (?:also )?(?:possible|questionable|"
    r"borderline)|suspected|questioned|considered|versus|vs)\b"
)


def label_reports(
    texts: Iterable[str],
    hierarchy: bool = True,
    jobs: int | None = None,
    labeler: str = "rules",
    weights: str | Path = "",
    progress: bool = False,
) -> pd.DataFrame:
    """Label reports with the 14 CheXpert observations.

    `texts`: n report texts (findings and impression; the indication asks, it does not state). `jobs`: processes, as
    `parallel.map_chunks` takes them. `progress` shows a bar.

    `labeler` "rules": this module. `hierarchy`: Lung Opacity also counts as present (uncertain) where one of its
    children is. "chexbert": CheXbert (Smit et al. 2020), as it answers, without `hierarchy`; its `weights` are the
    file chexbert.pth, "" for the copy of the Hugging Face hub; UserError where they are not there.

    Returns n rows x 14 columns (order of `observations.LABELS`) of float: 1 present, 0 absent, -1 uncertain, NaN not
    mentioned. "No Finding" is 1 where the text has words and nothing but devices is present or uncertain, else
    NaN.
    """
    if labeler == "chexbert":
        from lightmedvlm_utils.data.chexbert import chexbert_labels

        return chexbert_labels(texts, weights, progress)
    if labeler != "rules":
        raise UserError(f"There is no labeler {labeler!r}; choose rules or chexbert.")
    title = "labelling" if progress else ""
    rows = list(map_chunks(_label_chunk, texts, hierarchy, jobs=jobs, title=title))
    return pd.DataFrame(np.concatenate([np.empty((0, len(LABELS))), *rows]), columns=list(LABELS))


def _label_chunk(texts: Sequence[str], hierarchy: bool) -> np.ndarray:
    rows = [_label_report(text or "", hierarchy) for text in texts]
    return np.array(rows, dtype=float).reshape(len(texts), len(LABELS))


def _label_report(text: str, hierarchy: bool) -> list[float]:
    states: dict[str, float] = {}
    for sentence in _SENTENCE.split(text):
        for label, state in label_sentence(sentence.strip().lower()):
            states[label] = _stronger(states.get(label), state)
    if hierarchy:
        children = {states.get(child) for child in OPACITIES}
        for state in (UNCERTAIN, PRESENT):
            if state in children:
                states["Lung Opacity"] = _stronger(states.get("Lung Opacity"), state)
    found = any(state != ABSENT for label, state in states.items() if label != "Support Devices")
    if not found and re.search(r"[a-z]{3}", text.lower()):
        states["No Finding"] = PRESENT
    return [states.get(label, np.nan) for label in LABELS]


def _stronger(a: float | None, b: float) -> float:
    """Aggregate two statements on one label, as CheXpert does: present over uncertain over absent."""
    order = (ABSENT, UNCERTAIN, PRESENT)
    return b if a is None or order.index(b) > order.index(a) else a


@lru_cache(maxsize=50_000)  # radiologists repeat themselves: most sentences have been seen before
def label_sentence(sentence: str) -> tuple[tuple[str, float], ...]:
    """Labels that one lower-case sentence speaks of, with the state it gives them.

    >>> label_sentence("no pneumothorax, but a small effusion may be present.")
    (('Pleural Effusion', -1.0), ('Pneumothorax', 0.0))
    """
    states: dict[str, float] = {}
    sentence = _NO_CHANGE.sub("unchanged", sentence)
    for clause in _CLAUSE.split(sentence):
        for label, rule in _COMPILED.items():
            for state in _clause_states(clause, rule):
                states[label] = _stronger(states.get(label), state)
    return tuple(sorted(states.items()))


def _clause_states(clause: str, rule: _Compiled) -> list[float]:
    mentions, hints, normals = rule
    states = [assertion(clause[: match.end()], clause[match.end() :]) for match in mentions.finditer(clause)]
    if hints and (match := hints.search(clause)):
        hinted = assertion(clause[: match.end()], clause[match.end() :])
        return [*states, ABSENT if hinted == ABSENT else UNCERTAIN]
    if normals and normals.search(clause):
        states.append(ABSENT)
    return states


def assertion(before: str, after: str) -> float:
    """Whether a clause asserts (1), denies (0) or hedges (-1) the mention that `before` ends with."""
    if _OPEN_BEFORE.search(before) or _OPEN_AFTER.search(after):
        return UNCERTAIN
    if _NEGATION_BEFORE.search(before) or _NEGATION_AFTER.search(after):
        return ABSENT
    return UNCERTAIN if _HEDGE_BEFORE.search(before) or _HEDGE_AFTER.search(after) else PRESENT


class _Compiled(NamedTuple):
    """A rule with its expressions of one kind joined into one; None where there are none."""

    mentions: re.Pattern[str]
    hints: re.Pattern[str] | None
    normals: re.Pattern[str] | None


def _compile(rule: Rule) -> _Compiled:
    hints, normals = (re.compile("|".join(found)) if found else None for found in (rule.hints, rule.normals))
    mentions = re.compile("|".join(rule.mentions) or "(?!)")  # without any: what never matches, not what always does
    return _Compiled(mentions, hints, normals)


_COMPILED = {label: _compile(rule) for label, rule in RULES.items()}
