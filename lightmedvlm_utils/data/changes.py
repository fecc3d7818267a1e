"""Comparisons with an earlier study, which a model that sees one study cannot know: where a report makes them.

`reports.remove_priors` takes such words out; here they are found, those woven into a finding ("has increased") too.
"""

from __future__ import annotations

import re
from functools import lru_cache

from lightmedvlm_utils.data.labels import split_clauses

_BY = r"(?:(?!an? )\w+ )?"  # "has slightly increased", not "is an increased"
_SINCE = r"(?:since|from|compared|when compared)\b"
_IN = rf"(?:in (?:size|extent|severity|volume|number|prominence|the)\b|{_SINCE})"
_THEN = r"(?:since|compared|than (?:before|(?:the )?(?:prior|previous)))\b"
_HERE = r"(?= *(?:[.,;]|$))"
_CHANGES = {
    "new": r"\bnew(?:ly)?\b|\binterval (?:development|appearance|placement)|"
    r"\b(?:has|have) (?:now )?(?:developed|appeared)\b",
    "unchanged": r"\bunchanged|\bstable\b|\bsimilar (?:to|in|compared|appear)|\bpersist|\bagain\b|redemonstrat|"
    r"\b(?:no|without) (?:\w+ ){0,2}change\b|\bremains?\b|\bas before\b|\bconstant\b",
    "increased": rf"\b(?:has|have|interval) {_BY}increased?\b|\bincreased? {_IN}|\bincreasing\b|\bworsen|"
    rf"(?<!diameter )\b(?:is|are) {_BY}increased{_HERE}|\bprogress(?:ed|ion|ing|ively)\b|"
    rf"\benlarging\b|\binterval enlargement|\b(?:worse|larger|more \w+) {_THEN}",
    "decreased": rf"\b(?:has|have|interval) {_BY}decreased?\b|\bdecreased? {_IN}|\bdecreasing\b|\bimprov|"
    rf"(?<!volumes )\b(?:is|are) {_BY}decreased{_HERE}|\bresolv(?:ing|ution)\b|"
    rf"\b(?:smaller|less \w+) {_THEN}|\b(?:has|have) {_BY}(?:resolved|cleared)\b|"
    r"\binterval (?:removal|resolution|clearing)\b",
}
_CHANGE = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _CHANGES.items()))

_STUDY = r"(?:stud|exam|radiogra|film|image|imaging|x-?ray|cxr|ct\b|mri\b|scan|report)"
_PRIOR = re.compile(
    r"\b(?:prior|previous|preceding|earlier|comparison|old|outside) "
    rf"(?:(?:chest|portable|frontal|pa|ap|and|lateral|ct|recent|available) )*{_STUDY}|"
    r"\b(?:since|from|to|with|than|on) (?:the |a |an |any |most |recent )*(?:prior|previous|earlier|comparison|last)"
    r"(?= *(?:[.,;)]|$))|"
    r"\b(?:compared?|comparison|relative|similar) (?:is made )?(?:to|with)\b"
    r"(?! (?:that on )?(?:the )?(?:left|right|contralateral|other|opposite))|"
    r"\bpreviously (?:seen|noted|described|identified|demonstrated|visuali[sz]ed|present)\b|"
    r"\binterval (?:change|develop|increase|decrease|improve|worsen|removal|placement|resol|clear|progress|appear)|"
    r"\bin the interval\b|\bno longer\b"
)
# To say that there is no earlier study is no comparison.
_NO_PRIOR = re.compile(
    r"\b(?:no|without)(?: (?:available|recent|relevant|direct|old|other|any))* (?:priors?|previous|comparisons?)\b"
    r"[^.;,]*|"
    r"\b(?:prior|previous|comparison)s?\b[^.;,]{0,30}\b(?:not |un)available\b[^.;,]*|"
    r"\b(?:not |un)available for comparison|\bcomparison (?:is )?none"
)


def find_changes(clause: str) -> list[tuple[int, str]]:
    """The changes that a lower-case clause tells of, each with its place: new, unchanged, increased or decreased.

    >>> find_changes("left effusion has increased")
    [(14, 'increased')]
    """
    return [(match.start(), match.lastgroup or "") for match in _CHANGE.finditer(clause)]


@lru_cache(maxsize=50_000)
def sentence_compares(sentence: str) -> bool:
    """Whether a lower-case sentence speaks of an earlier study or of a change since then."""
    clauses = split_clauses(_NO_PRIOR.sub("", sentence))
    return any(_PRIOR.search(clause) or _CHANGE.search(clause) for clause in clauses)
