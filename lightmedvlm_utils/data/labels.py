"""Labels from report text by rules, in CheXpert's manner: mention, negation, uncertainty, aggregation.

One table, `RULES`, holds every phrase; to teach the labeler a phrase, add a line there. The approach follows
Irvin et al. 2019 (CheXpert) and Chapman et al. 2001 (NegEx); the phrases and the code are our own.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
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
# Between an organ and its size no other organ's size may stand ("heart size is normal mediastinal widening").
_TO_BIG = r"(?:(?!normal|unremarkable|(?<!and )mediastin|\baort)[^.,;]){0,35}\b"
_MEDIASTINUM_TO_BIG = r"(?:(?!normal|unremarkable|(?<!and )\b(?:heart|cardiac))[^.,;]){0,35}\b"
_VESSELS = r"(?:vascular\w*|vasculature|vessels|vascular markings)"
RULES: dict[str, Rule] = {
    "Atelectasis": Rule(
        (
            r"\b(?:atelecta\w*|(?:lobe|lobar|lung)\b.{0,12}\bcollapsed?\b|collapse of the (?:left|right)\b|"
            r"collapse of (?:\w+ ){0,3}(?:lung|lobe|lingula)|collapsed (?:\w+ ){0,2}(?:lung|lobe|lingula))",
        ),
        hints=(r"\bvolume loss\b|\bloss of volume\b",),  # after surgery, for one, it is no atelectasis
    ),
    "Cardiomegaly": Rule(
        (
            rf"cardiomegaly|\b{_HEART}\b{_TO_BIG}{_BIG}|{_BIG}(?: of)?(?: the)? {_HEART}",
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
            r"\b(?:(?<!soft tissue )o?edema|cephalization|heart failure|chf\b|(?:fluid|volume) overload|"
            r"(?:vascular|venous|pulmonary) (?:congesti\w+|engorgement)(?![^.,;]{0,20}\bnormal)|"
            r"(?:vascular|vessel) prominence|indistinct\w* (?:\w+ ){0,2}(?:vascular|vessel)|"
            rf"prominen\w+ (?:of )?(?:\w+ ){{0,3}}{_VESSELS})",
        )
    ),
    "Enlarged Cardiomediastinum": Rule(
        (rf"mediastin\w*{_MEDIASTINUM_TO_BIG}{_BIG}|{_BIG}(?:(?!normal|\bwith\b)[^.,;]){{0,25}}mediastin\w*",),
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
            r"\bopaci\w*|\bhaz(?:y|iness)\b|\binfiltrat\w*|\bair[- ]?space (?:disease|process)",
            r"\binterstitial (?:markings?|pattern|prominence|thickening|lung disease|disease)|\breticul\w*",
            r"\bincreased (?:density|markings)|\bscarring\b|\bperibronchial (?:thickening|cuffing)",
        ),
        normals=(
            r"\blung(?:s| fields)\b(?: \w+){0,3} clear\b(?! of\b)",
            r"\bclear lungs?\b|\blungs clear\b(?! of\b)",
        ),
    ),
    "Pleural Effusion": Rule(
        (r"\b(?:(?<!pericardial )effusions?\b|pleural fluid|hydro(?:pneumo)?thora\w*)",),
        hints=(r"\bblunt\w*[^.;]{0,40}(?:costophrenic|sulc|cp angle)|costophrenic[^.;]{0,40}\bblunt\w*",),
        normals=(r"\bcostophrenic[^.;]{0,30}\b(?:sharp|clear)|\bpleural spaces?\b[^.;]{0,20}\b(?:clear|normal)",),
    ),
    "Pleural Other": Rule(
        (
            r"\bpleural?\b[^.,;]{0,25}\b(?:thicken\w*|scar\w*|plaques?|capp?\w*|calcif\w*)|\bfibrothorax",
            r"\b(?:thicken\w*|scarring) of the (?:\w+ )?(?:pleura|fissure)|\bapical cap|\bfissur\w* thickening",
        )
    ),
    "Pneumonia": Rule((r"pneumonia\w*|\b(?:(?<!granulomatous )infecti\w*|pneumonitis)",)),
    "Pneumothorax": Rule((r"\b(?:hydro)?pneumothora\w*|\bptx\b",)),
    "Support Devices": Rule(
        (
            r"\b(?:tubes?|catheters?|picc|pace ?makers?|pacer|pacing|defibrillators?|icds?|aicds?|leads?(?! to\b)|"
            r"etts?|ngt?|ogt?|drains?|pigtails?|lvads?|iabp|ecmo|cannulas?|coils?|stents?|tracheostomy|intubated|"
            r"hardware|(?:neuro)?stimulators?|generators?|recorder|sternotomy|wires?|clips?|staples?|sutures?|rods?|"
            r"screws?|ports?|mediport|dobb?hoff|swan-ganz)\b",
            r"\b(?:central|venous|arterial|jugular|ij|subclavian|femoral|dialysis|support|monitoring) lines?\b",
            r"\blines? and tubes|\bport-?a-?cath|\bbio?prosthe|\b(?:arthro|annulo)plast|\bassist device|\bballoon pump",
            r"\b(?:mechanical|prosthetic|replacement|artificial) (?:\w+ )?valve|\bvalv\w+ (?:replacement|prosthes)",
            r"\b(?:closure|support|implanted|electronic|stimulator) (?:and monitoring )?devices?",
            r"\bprosthe(?:s[ie]s|tic)\b|\binternal fixation",
            r"\btip\b[^.,;]{0,40}\b(?:svc|vena cava|cavo?a?-?atrial|caval|atrium|carina)\b",
            r"\b(?:fixation|fusion|metallic|surgical) plates?\b|\b(?:ivc|vena cava\w*) filter|\bgastric band|"
            r"\b(?:ventricular|\w*peritoneal|vp|tips) shunt|\bshunt (?:tubing|catheter)",
        ),
        normals=(r"\bextubat\w*",),
    ),
}

OTHER = "Other Finding"  # not a label of its own, but a report with one is not "No Finding"
# Beginnings of what no label covers. Low lung volumes are left out: they tell of a breath, not of a disease.
OTHER_FINDINGS = (
    r"emphysem|copd|obstructive|hyper(?:inflat|expan|aerat|lucen|disten)|air trapping|bull(?:a|ous)|blebs?\b",
    r"flatten\w* (?:of )?(?:\w+ ){0,3}(?:hemi)?diaphragm|(?:hemi)?diaphragm\w* (?:\w+ ){0,2}flatten",
    r"(?:elevat|eventrat)\w* (?:of )?(?:\w+ ){0,3}(?:hemi)?diaphragm",
    r"(?:hemi)?diaphragm\w* (?:\w+ ){0,3}(?:elevat|eventrat)",
    r"hernia|bronchiectas|bronchitis|fibros|fibrotic|granulom|sarcoid|tubercul|cysts?\b|cystic|cavit(?:y|ary|ation)",
    r"calcif|atheroscl|tortuo|ectasi|ectatic|unfold|uncoil|aneurysm|dissection|dextrocardia|situs (?:inver|ambig)",
    r"\w{0,8}scolio|kypho|degenerat|osteophyt|spondyl|spurring|spurs\b|syndesmo|osteo(?:pen|por|arth)|deminerali",
    r"arthr(?:itis|itic|osis)|deformit|(?:compression|wedg)\w* (?:of|deform|chang)|dislocat|sublux",
    r"(?:lytic|sclerotic|blastic|expansile|bone|bony|osseous) lesions?",
    r"free (?:\w+ )?air|pneumo(?:peritoneum|mediastinum|pericardium)|(?:subcutaneous|soft tissue) (?:air|gas)",
    r"\w{0,5}adenopathy|(?:hilar|hilum) (?:\w+ )?(?:enlarge|prominen|full)|pericardial effusion|goiter|hematoma",
    r"scars?\b|prominen\w* (?:of )?(?:\w+ ){0,2}hil(?:ar|um)\b",
    r"(?:enlarge|dilat|prominen)\w* (?:\w+ ){0,3}pulmonary arter",
    r"foreign bod|pneumatocele|lobectom|pneumonectom|(?:trachea\w*|mediastin\w*) (?:\w+ ){0,2}(?:deviat|shift)",
)

# A negation or hedge reaches to the end of its clause. These words open a new one.
_NO_LIST = r"(?!.{0,200}(?:\b(?:or|nor)\b|/))"  # after the comma of a list that "no" heads comes an "or"
_SIZE = r"(?:tiny|small|moderate|large|mild|minimal|trace|stable|unchanged|new|persistent|residual)\b"
_CLAUSE = re.compile(
    r"[;:]|(?<! vs)\.\s|"
    r"\b(?=(?:but|however|although|though|except|apart from|aside from|other than|whereas|while|which|"
    rf"there (?:is|are)|otherwise)\b)|, (?=(?:(?:and )?(?:a |an )?{_SIZE}){_NO_LIST})"
)
# After a negation or hedge these open one too; elsewhere they may join what belongs together.
_STATES = (
    r"(?:remains?|persists?|in place|"
    r"(?:is|are|appears?) (?:again |now )?(?:unchanged|stable|in place|(?:de|in)creased|present))\b"
)
_NEW_STATEMENT = re.compile(
    r",? and (?=the\b[^,;]{0,50}\b(?:is|are|has|have|remains?|appears?|persists?)\b)|, and (?=the\b)|"
    rf",? and (?=an? {_SIZE})|, with (?=(?:an?|the|{_SIZE})\b)|"
    r"(?<!consistent)(?<!compatible)(?<!associated)(?<!keeping)(?<!compared)(?<!correlated) with "
    rf"(?=(?:a |an |the )?(?:(?:left|right|bilateral) )?{_SIZE})|"
    rf", (?=(?:and )?[^,;]{{0,50}}\b{_STATES}){_NO_LIST}|"
    rf",? (?=(?:and )?(?:possibl[ey]|probabl[ey]|questionable|suspected)\b){_NO_LIST}"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])|(?<=[a-z]\.)(?=[A-Z][a-z])|\n+")
_NO_CHANGE = re.compile(
    r"\b(?:no|without|not)(?: \w+){0,2} (?:(?:changed?|difference)\b(?: (?:in|of|from)\b)?|"
    r"(?:worsening|progression|improvement) (?:in|of) the\b)"
)
# What an earlier study did not show is new; the words deny nothing in this one.
_SEEN = r"(?:seen|present|identified|visible|visuali[sz]ed|evident|noted)"
_NOT_BEFORE = re.compile(
    rf"\bnot (?:\w+ )?{_SEEN} (?:previously|(?:on|in|at) (?:the |a |an )?(?:\w+ )?"
    rf"(?:prior|previous|earlier|old|last|comparison))\b|\bnot previously {_SEEN}\b"
)
# What the film could show, or what to look for, is no statement.
_ASKED_BEFORE = re.compile(
    r"\b(?:sensitiv\w+|to detect|detect(?:ion|ing)|(?:evaluation|assessment) (?:for|of)|correlat\w+ (?:\w+ ){0,3}for)\b"
    r"[^.,;]{0,40}$"
)

_NEGATION_BEFORE = re.compile(
    r"\b(?:no|not|without|never|neither|nor|absen(?:t|ce of)|negative for|free of|clear of|den(?:y|ies)|"
    r"rather than|resolved|resolution of)\b"
)
_NEGATION_AFTER = re.compile(
    r"^[^.,;]{0,40}?\b(?:(?:not|no longer) (?:\w+ )?(?:seen|identified|present|visuali[sz]ed|appreciated|evident|"
    r"noted|demonstrated|detected|visible|in place)|(?:has|have) (?:now |since )?cleared|"
    r"(?:is|are) (?:now )?(?:absent|unlikely|excluded)|ruled out|(?<!not )(?<!not yet )(?<!ally )(?<!etely )resolved|"
    r"(?:has|have|is|are) completely resolved)\b"
)
# Removal denies the device, not what the film shows after it.
_REMOVAL_BEFORE = re.compile(
    r"\b(?:removed (?:the|an?)|(?:removal|withdrawal|discontinu\w+) of)\b"
    r"(?!.{0,400}\b(?:placement|insertion|exchange|placed|replaced)\b)"
)
_REMOVAL_AFTER = re.compile(
    r"^(?:(?!\b(?:remain|in place|unchanged|stable))[^.,;]){0,60}?"
    r"(?<!be )\b(?:removed|taken out|withdrawn|discontinued)\b"
)
# These contain a "not" that does not deny: they are looked for first.
_OPEN_BEFORE = re.compile(
    r"\b(?:cannot|can not|can't|could not|not|difficult to|hard to|impossible to) (?:\w+ )?(?:exclude|rule out)\b"
)
_OPEN_AFTER = re.compile(
    r"^[^.;]{0,60}?\b(?:(?:cannot|can not|can't|could not|not) (?:\w+ )?(?:be )?(?:\w+ )?(?:excluded|ruled out)|"
    r"(?:difficult|hard|impossible) to (?:\w+ )?(?:exclude|rule out))\b"
)
_HEDGE_BEFORE = re.compile(
    r"\b(?:possibl[ey]|possibility|probabl[ey]|question(?:able|ed)?|suspect\w*|suspicio\w+|may|might|could|borderline|"
    r"equivocal|likely|presum\w+|concern\w*|worrisome|versus|vs|suggest\w*|potential\w*|perhaps|consider\w*|"
    r"differential|rule out|r/o|evaluate for|favou?r\w*|if any)\b"
)
_HEDGE_AFTER = re.compile(
    r"^[^.,;]{0,60}?\b(?:(?:may|might|could) (?:also )?be present|(?:is|are) (?:also )?(?:possible|questionable|"
    r"borderline|favou?red|likely|probable)|if (?:any|present)|suspected|questioned|considered)\b"
    r"|^(?:(?! with | represent| reflect| due | from | secondary | related | consistent | compatible | suggest)[^.,;])"
    r"{0,60}?\b(?:versus|vs)\b"
)
# "Atelectasis or pneumonia": one of them, and neither surely.
_KIND = (
    r"\b(?:atelecta|pneumoni|consolidat|infiltrat|opaci|infecti|edema|effusion|pleural fluid|thicken|scar|fibros|nodul|"
    r"mass|aspirat|contusion|hemorrhag|granulom|artifact|airspace|volume loss|pneumothora|congestion|fluid)\w*"
)
# Words that part what is seen from what it is taken for, or one finding from the next, end such an offer.
_JOINED = (
    r"(?!(?:may|might|could|with|due|from|no|not|without|and|is|are|there)\b|"
    r"represent|reflect|suggest|consistent|compatible|favor|concern|suspicious)[a-z]+"
)
_EITHER = re.compile(
    rf"(?!\bopaci\w*,|\bairspace \w+,){_KIND}(?:,? {_JOINED}){{0,4}},? (?:and/)?or (?:{_JOINED} ){{0,4}}?{_KIND}"
)
_SCOPE = 400  # letters before a mention that are searched for its negation: time stays in proportion to the text


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
    mentioned. "No Finding" is 1 where the text has words and nothing but devices is present or uncertain, of
    the labels as of `OTHER_FINDINGS`, else NaN.
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
    for sentence in split_sentences(text):
        for label, state in label_sentence(sentence):
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
    """Labels (and `OTHER`) that one lower-case sentence speaks of, with the state it gives them.

    >>> label_sentence("no pneumothorax, but a small effusion may be present.")
    (('Pleural Effusion', -1.0), ('Pneumothorax', 0.0))
    """
    states: dict[str, float] = {}
    for clause in split_clauses(sentence):
        for mention in find_mentions(clause):
            states[mention.label] = _stronger(states.get(mention.label), mention.state)
    return tuple(sorted(states.items()))


class Mention(NamedTuple):
    """Words of a clause, `clause[start:end]`, that speak of a label (or `OTHER`), and the state that they give it."""

    label: str
    state: float
    start: int
    end: int
    field: str  # of the Rule: "mentions", "hints" or "normals"


def split_sentences(text: str) -> list[str]:
    """The sentences of a report, in lower case; some may be empty."""
    return [sentence.strip().lower() for sentence in _SENTENCE.split(text)]


def split_clauses(sentence: str) -> Iterator[str]:
    """The parts of a lower-case sentence in which a negation or hedge holds; "no change in" reads "unchanged"."""
    sentence = _NOT_BEFORE.sub("new", _NO_CHANGE.sub("unchanged", sentence))
    for clause in _CLAUSE.split(sentence):
        cue = _CUE.search(clause)
        if cue is None:
            yield clause
            continue
        first, *rest = _NEW_STATEMENT.split(clause[cue.end() :])
        yield clause[: cue.end()] + first
        yield from rest


def find_mentions(clause: str) -> list[Mention]:
    """What one clause of `split_clauses` speaks of, by label in the order of `RULES`, then `OTHER`.

    >>> find_mentions("no left effusion")
    [Mention(label='Pleural Effusion', state=0.0, start=8, end=16, field='mentions')]
    """
    either = [match.span() for match in _EITHER.finditer(clause)] if "or " in clause else []
    return [mention for label, rule in _COMPILED.items() for mention in _find(clause, label, rule, either)]


def _find(clause: str, label: str, rule: _Compiled, either: list[tuple[int, int]]) -> Iterator[Mention]:
    mentions, hints, normals = rule
    for match in mentions.finditer(clause):
        before, after = _around(clause, match)
        if _ASKED_BEFORE.search(before, 0, len(before) - len(match[0])):
            continue
        state = _device_state(before, after) if label == "Support Devices" else assertion(before, after)
        offered = bisect_left(either, (match.end(),))  # how many spans start before the mention ends
        if state == PRESENT and offered and match.start() < either[offered - 1][1]:
            state = UNCERTAIN
        yield Mention(label, state, *match.span(), "mentions")
    if hints and (hint := hints.search(clause)):
        hinted = assertion(*_around(clause, hint))
        yield Mention(label, ABSENT if hinted == ABSENT else UNCERTAIN, *hint.span(), "hints")
    elif normals and (normal := normals.search(clause)):
        yield Mention(label, ABSENT, *normal.span(), "normals")


def _around(clause: str, match: re.Match[str]) -> tuple[str, str]:
    """The text up to the end of a mention, and the text after it, as far as a negation reaches."""
    end = match.end()
    return clause[max(0, min(match.start(), end - _SCOPE)) : end], clause[end : end + _SCOPE]


def _device_state(before: str, after: str) -> float:
    return ABSENT if _REMOVAL_BEFORE.search(before) or _REMOVAL_AFTER.search(after) else assertion(before, after)


def assertion(before: str, after: str) -> float:
    """Whether a clause asserts (1), denies (0) or hedges (-1) the mention that `before` ends with."""
    opened = _OPEN_BEFORE.search(before)
    if (opened and not _NEGATION_BEFORE.search(before, opened.end())) or _OPEN_AFTER.search(after):
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
_COMPILED[OTHER] = _Compiled(re.compile(rf"\b(?:{'|'.join(OTHER_FINDINGS)})"), None, None)
_CUE = re.compile("|".join(cue.pattern for cue in (_NEGATION_BEFORE, _REMOVAL_BEFORE, _HEDGE_BEFORE)))
