"""Facts from report text: beside each finding and its state the kind, side, place and size, and what has changed.

Built on `labels`: that module says which words of a clause name a finding, and whether they assert, deny or hedge it;
this one says which of the clause's other words describe that finding. A description stands before it ("small left
effusion"), behind it ("effusion at the left base"), or is shared ("left effusion and atelectasis", "opacity in the
left lower lobe, likely pneumonia"). The idea of judging reports by such structured facts is RadGraph's (Jain et al.
2021, arXiv 2106.14463), which learns them; the rules here are our own.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from lightmedvlm_utils.data.changes import find_changes, sentence_compares
from lightmedvlm_utils.data.labels import (
    ABSENT,
    OTHER,
    PRESENT,
    UNCERTAIN,
    Mention,
    find_mentions,
    split_clauses,
    split_sentences,
)
from lightmedvlm_utils.data.places import JOIN, WITHIN, Place, Word, find_words, grade_step, read_places, same_zone
from lightmedvlm_utils.observations import OPACITIES

STATES = {PRESENT: "present", ABSENT: "absent", UNCERTAIN: "uncertain"}
SIDELESS = ("Cardiomegaly", "Enlarged Cardiomediastinum")  # one heart, one mediastinum: no side, no zone


class Fact(NamedTuple):
    """What a report says of one finding; "" (None for the size) where it does not say."""

    finding: str  # one of observations.FINDINGS
    state: str  # "present" | "absent" | "uncertain"
    kind: str = ""  # one of KINDS[finding]
    side: str = ""  # the patient's: "left" | "right" | "both"
    zone: str = ""  # "apical" | "upper" | "mid" | "lower" | "basal"; a lobe counts as its zone
    grade: str = ""  # one of places.AMOUNTS or SEVERITIES
    size_mm: float | None = None  # as measured, the largest extent
    change: str = ""  # since an earlier study: "new" | "unchanged" | "increased" | "decreased"
    section: str = ""  # "findings" | "impression"; "" before any heading


# What a finding is more exactly, by what stands in or around its mention. Two kinds are two findings.
KINDS: dict[str, dict[str, str]] = {
    "Support Devices": {
        "endotracheal tube": r"endotracheal|\bett?\b|\bintubat",
        "tracheostomy": r"tracheostom",
        "nasogastric tube": r"\b(?:naso|oro)-?(?:gastric|enteric|duodenal|jejunal)|\benter(?:ic|al)\b|\bgastric tube|"
        r"\b[no]gt?\b|feeding tube|dobb?hoff",
        "chest tube": r"chest (?:tube|drain)|thoracostomy|pigtail|pleural (?:drain|catheter|tube)|pleurx",
        "pacemaker": r"pace ?maker|\bpacer|pacing|defibrillator|\ba?icds?\b",
        "PICC": r"\bpicc\b|peripherally inserted",
        "port": r"\bports?\b|port-?a-?cath|mediport",
        "pulmonary artery catheter": r"swan|pulmonary arter\w+ catheter",
        "central line": r"central (?:venous )?(?:line|catheter)|\bcvc\b|venous (?:line|catheter)|jugular|\bij\b|"
        r"subclavian|dialysis",
        "sternal wires": r"stern(?:al|otomy)|cerclage",
        "valve": r"valv",
        "stent": r"\bstents?\b",
        "clips": r"\bclips?\b|staples?\b|sutures?\b",
        "balloon pump": r"balloon pump|\biabp\b",
        "assist device": r"assist device|\blvad",
        "stimulator": r"stimulat",
        "filter": r"\bfilter",
        "shunt": r"\bshunt",
        "orthopedic hardware": r"arthroplast|\bscrews?\b|\brods?\b|fixation|\bplates?\b|fusion|hardware",
    },
    "Fracture": {
        "rib": r"\bribs?\b|costal",
        "clavicle": r"clavic",
        "spine": r"vertebra|\bspin(?:e|al)|compression|\b[tl]\d{1,2}\b|thoracic|lumbar",
        "sternum": r"stern(?:um|al)\b",
        "shoulder": r"humer|scapul|shoulder|glenoid",
    },
    "Lung Lesion": {"nodule": r"nodul", "mass": r"\bmass"},
    "Pleural Other": {"plaque": r"plaque|calcif", "thickening": r"thick|scar|\bcap|fibrothorax"},
    "Lung Opacity": {
        "interstitial": r"interstit|reticul|peribronch|markings",
        "scar": r"scar",
        "airspace": r"air[- ]?space|infiltrat",
    },
    "Edema": {"congestion": r"congesti|engorge|cephaliz|prominen|indistinct|overload"},
}
# Words that tell the kind of a device where none of those does: parts of it, or where it ends.
_TELLTALES = {
    "pacemaker": r"\bleads?\b|generator",
    "drain": r"\bdrains?\b",
    "sternal wires": r"\bwires?\b",
    "endotracheal tube": r"\bcarina\b",
    "central line": r"\bsvc\b|\bcava\b|cava?o?a?-?atrial|caval|\batrium\b",
}
_REACH = 200  # letters from a mention in which its kind is looked for: time stays in proportion to the text
_VENOUS = {"PICC", "port", "pulmonary artery catheter"}  # central lines too, in words


def _alternatives(kinds: dict[str, str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?P<k{i}>{pattern})" for i, pattern in enumerate(kinds.values())))


_KINDS = {label: (tuple(kinds), _alternatives(kinds)) for label, kinds in KINDS.items()}
_BY_TELLTALE = (tuple(_TELLTALES), _alternatives(_TELLTALES))

# What ends a noun phrase towards its beginning. "Amount of" and the like do not.
_BREAK = re.compile(
    r"(?P<inside>\b(?:amounts?|areas?|foc(?:us|i)|degrees?|regions?|patch(?:es)?|bands?|components?|volumes?|levels?) "
    r"of\b(?: the\b)?)|"
    r"\b(?:in|at|on|of|with|within|without|from|by|for|a|an|the|no|not|than|which|that|is|are|was|were|has|have|had|"
    r"be|been|may|might|could|remains?|appears?|shows?|seen|noted|identified|present|clear|normal|unremarkable|"
    r"intact|expanded|represent\w*|reflect\w*|suggest\w*|indicat\w*|demonstrat\w*|reveal\w*|contain\w*|involv\w*|"
    r"obscur\w*|caus\w*|develop\w*|consistent|compatible|caps?|overl\w+|project\w*|ends?|tips?|compress\w*)\b"
)
# Behind a mention: what may stand between it and its place.
_TO_PLACE = re.compile(
    r"\s*,?(?:(?!\b(?:and|or|plus|with|without|no|from|than|relative|compared|but)\b)(?:[^,/&]|,(?= measur))){0,60}"
)
_AFTER_PLACE = re.compile(r",? with\b|\.")
_SUBJECT = re.compile(r"[\w\s-]{0,25}?\b(?:is|are|was|were|has|have|remains?|appears?|clear|normal)\b")
_CLEAR = re.compile(r"[\w\s-]{0,25}?\b(?:clear|normal|unremarkable|expanded)\b")
_PREPOSITION = re.compile(
    r"\b(?:in|at|on|of|along|over|within|involving|overlying|throughout|near|caps|to)(?: [\w-]+){0,2}\s*$"
)
_PREPOSED = re.compile(r"\s*(?:in|at|on|within|along|over|throughout|overlying|near|involving)\b")
_NOTHING_THERE = re.compile(r"\b(?:clear|normal|unremarkable|expanded|intact|removed)\b")
# Between two findings: the second is what the first is taken for, stands beside it, or is named in one breath with it.
_EXPLAINS = re.compile(
    r"\b(?:represent|reflect|suggest|consistent|compatible|concern|worrisome|suspicious|favou?r|due to|related to|"
    r"secondary|indicat|likely|probabl|possibl|may be|could be|might be|such as|caus)\w*"
)
_OFFERS = re.compile(r"\b(?:or|vs|versus|which)\b")
_BESIDE = re.compile(r"\bwith\b")

# Denies less than the finding: "otherwise clear", "no other nodule", "no suspicious nodule".
_RESTRICTED = re.compile(r"\b(?:otherwise|other|remainder|rest of|additional|further|elsewhere|suspicious)\b")

_HEADING = re.compile(r"\b(findings|impression)\s*:", re.IGNORECASE)
_ITEM = re.compile(r"(?:^|(?<=[\n.:;!?]))[ \t]*\(?\d{1,2}[.)](?=\s)|(?<=\s)\(?\d{1,2}\)(?=\s)")
_WRAPPED = re.compile(r"[ \t]*\n[ \t]*(?=[a-z])")  # a line break inside a sentence


def read_facts(report: str) -> tuple[Fact, ...]:
    """Every statement of a report about a finding, in its order; what is said twice comes twice.

    `report`: plain text with or without the headings "Findings:" and "Impression:". An opacity that its own clause
    explains ("opacity consistent with pneumonia") is read as what explains it, at the opacity's place.

    >>> read_facts("Small left and moderate right effusions.")[1][:6]
    ('Pleural Effusion', 'present', '', 'right', '', 'moderate')
    """
    return tuple(
        fact._replace(section=section) if section else fact
        for section, text in _sections(report)
        for sentence in split_sentences(text)
        for fact in _sentence_facts(sentence)
    )


def compares_with_prior(report: str) -> bool:
    """Whether a report speaks of an earlier study or of a change since then.

    >>> compares_with_prior("The left effusion has increased."), compares_with_prior("Left effusion. No prior studies.")
    (True, False)
    """
    return any(sentence_compares(sentence) for _, text in _sections(report) for sentence in split_sentences(text))


def contradictions(facts: Sequence[Fact]) -> list[tuple[Fact, Fact]]:
    """Pairs of a report's statements that cannot both be true.

    A denial and an assertion of the same thing ("no effusion", "small left effusion"); and a finding of the Impression
    on a side that the Findings do not give it. No contradiction: a denial of more than is asserted ("no large effusion"
    beside a small one), of what is new, or of opacities beside a scar or interstitial marking; and a suspicion.
    """
    said = [fact for fact in facts if fact.state != "absent"]
    denied = [fact for fact in facts if fact.state == "absent"]
    found = [(no, yes) for no in denied for yes in said if _denies(no, yes)]
    for fact in said:
        if fact.section == "impression" and fact.side:
            before = [other for other in said if other.section == "findings" and same_kind(fact, other)]
            known = {side for other in before for side in _sides(other)}
            if known and "" not in known and not known >= set(_sides(fact)):
                found.append((before[0], fact))
    return found


_LEFT_OPEN = ("scar", "interstitial", "congestion")  # kinds that a denial of the whole label does not speak of


def _denies(no: Fact, yes: Fact) -> bool:
    return (
        no.finding == yes.finding
        and yes.state == "present"
        and no.change != "new"
        and (no.kind == yes.kind if no.kind else yes.kind not in _LEFT_OPEN)
        and (not no.side or bool({*_sides(no)} & {*_sides(yes)}))
        and (not no.zone or same_zone(no.zone, yes.zone))
        and (not no.grade or (yes.grade != "" and grade_step(yes.grade) >= grade_step(no.grade)))
    )


def same_kind(a: Fact, b: Fact) -> bool:
    """Whether two facts are of one finding, and of one kind of it as far as both say."""
    return a.finding == b.finding and (not a.kind or not b.kind or a.kind == b.kind)


def _sides(fact: Fact) -> tuple[str, ...]:
    return ("left", "right") if fact.side == "both" else (fact.side,)


def _sections(report: str) -> Iterator[tuple[str, str]]:
    text = _ITEM.sub("\n", _WRAPPED.sub(" ", report))
    before, *rest = _HEADING.split(text)
    yield "", before
    yield from zip(map(str.lower, rest[::2]), rest[1::2], strict=True)


@lru_cache(maxsize=50_000)  # radiologists repeat themselves: most sentences have been seen before
def _sentence_facts(sentence: str) -> tuple[Fact, ...]:
    found: list[Fact] = []
    before = ""
    groups: list[_Group] = []
    for clause in _whole_clauses(sentence):
        last, groups = groups[-1:], _groups(clause, find_mentions(clause))
        if groups:
            _describe(clause, groups, before, last)
            found += _clause_facts(clause, groups)
        before = clause
    return tuple(found)


def _whole_clauses(sentence: str) -> list[str]:
    """The clauses, each with its afterthoughts: to "effusions" belongs "small on the left and large on the right"."""
    clauses: list[str] = []
    for clause in split_clauses(sentence):
        if clauses and _is_afterthought(clause):
            clauses[-1] = f"{clauses[-1]}, {clause}"
        else:
            clauses.append(clause)
    return clauses


def _is_afterthought(clause: str) -> bool:
    words = find_words(clause)
    if not words or words[0].name != "grade" or words[0].start or len(words) < 2:
        return False
    rest = _AFTER_PLACE.split(_rest(clause, words))[0]
    return WITHIN.fullmatch(rest) is not None and any(word.place.side for word in words)


# --------------------------------------------------------------------------- findings and what describes them


class _Group:
    """Mentions in one breath ("nodular opacity") and the places that the clause gives them."""

    def __init__(self, mention: Mention):
        self.mentions = [mention]
        self.start, self.end = mention.start, mention.end
        self.head = 0  # where the noun phrase begins that the mentions stand in
        self.places: list[Place] = []
        self.before = self.behind = False  # which side of the mentions their places were found on
        self.explained_by: set[str] = set()

    @property
    def device(self) -> bool:
        return all(mention.label == "Support Devices" for mention in self.mentions)

    @property
    def normal(self) -> bool:
        return all(mention.field == "normals" for mention in self.mentions)

    @property
    def absent(self) -> bool:
        return all(mention.state == ABSENT for mention in self.mentions)

    @property
    def sided(self) -> bool:
        return any(place.side for place in self.places)

    def fill(self, places: Sequence[Place]) -> None:
        """Take a place that was found far before the mentions; it says nothing of size."""
        own = self.places[0] if self.places else Place()
        filled = [own.filled(place.where) for place in places if place.side or place.zone]
        self.places, self.before = filled or self.places, bool(filled) or self.before

    def take(self, places: Sequence[Place], behind: bool = False) -> None:
        """Share the places of another finding, before this one or behind it, as far as it does not say its own."""
        own = self.places[0] if self.places else Place()
        self.places = list(dict.fromkeys(own.filled(Place(p.side, "" if own.zone else p.zone)) for p in places))
        self.before, self.behind = not behind, behind


def _groups(clause: str, mentions: Iterable[Mention]) -> list[_Group]:
    groups: list[_Group] = []
    for mention in sorted(mentions, key=lambda m: (m.start, -m.end)):
        last = groups[-1] if groups else None
        if last and _in_one_breath(clause, last, mention):
            last.mentions.append(mention)
            last.end = max(last.end, mention.end)
        else:
            groups.append(_Group(mention))
    return groups


def _in_one_breath(clause: str, group: _Group, mention: Mention) -> bool:
    if mention.start < group.end:
        return True
    gap = clause[group.end : mention.start]
    same = group.device == (mention.label == "Support Devices") and not group.normal and mention.field != "normals"
    return (
        same
        and re.fullmatch(r"[\s-]*(?:[a-z]+[\s-]+){0,2}", gap) is not None
        and not (_BREAK.search(gap) or JOIN.search(gap) or find_words(gap))
    )


def _describe(clause: str, groups: Sequence[_Group], before: str, last: Sequence[_Group]) -> None:
    """Give the groups of a clause their places: of their own, then those that they share.

    `before` is the clause before in the sentence, `last` its last group, if it has any.
    """
    words = find_words(clause)
    for i, group in enumerate(groups):
        group.head = _head(clause, groups[i - 1].end if i else 0, group.start, words, bool(i))
    for i, group in enumerate(groups):
        until = groups[i + 1].head if i + 1 < len(groups) else len(clause)
        _own_places(clause, group, _inside(words, group.head, until))
    _preposed(clause, groups[0], _inside(words, 0, groups[0].head))
    if not groups[0].sided and not groups[0].absent:
        if last and last[0].sided and clause.startswith("which"):
            groups[0].take(last[0].places)
        elif not last and not groups[0].device:
            groups[0].fill(_announced(before, clause))
    for i, (first, second) in enumerate(pairwise(groups), start=1):
        _share(clause, first, second)
        start, _ = _window(clause, groups, i)
        _preposed(clause, second, _inside(words, start, second.head))
    for first, second in reversed(list(pairwise(groups))):
        between = clause[first.end : second.start]
        alike = first.device == second.device and first.absent == second.absent
        if second.behind and alike and not first.sided and second.sided and _one_breath_list(between):
            first.take(second.places, behind=True)


def _inside(words: Sequence[Word], start: int, end: int) -> Sequence[Word]:
    """The words between two places of the clause."""
    return words[bisect_left(words, (start,)) : bisect_right(words, end, key=lambda word: word.end)]


def _head(clause: str, start: int, end: int, words: Sequence[Word], follows: bool) -> int:
    """Where the noun phrase of the mention at `end` begins; of a list behind another mention, its last item."""

    near = _inside(words, start, end)

    def free(match: re.Match[str]) -> bool:  # not the "than" of "right greater than left"
        return not any(word.start <= match.start() < word.end for word in near)

    breaks = [match for match in _BREAK.finditer(clause, start, end) if match["inside"] is None and free(match)]
    head = breaks[-1].end() if breaks else start
    joins = list(filter(free, JOIN.finditer(clause, head, end))) if follows else []
    if joins and (head > start or clause[head : joins[0].start()].strip()):
        return joins[-1].end()
    for this, following in pairwise([*joins, None]):  # "nodule, 8 mm, and right mass": the size is the nodule's
        until = following.start() if following else end
        if this and not any(word.name == "size" for word in _inside(near, this.end(), until)):
            return this.end()
    return head


def _own_places(clause: str, group: _Group, words: Sequence[Word]) -> None:
    """Give a group the places that `words` name, which stand between its head and the next group's."""
    if group.device:  # a lead in the right heart does not make the pacemaker right
        words = [word for word in words if word.name != "heart"]
    before = _last_row(clause, [word for word in words if word.end <= group.start])
    behind: list[Word] = []
    end = group.end
    for word in words[bisect_left(words, (group.start,)) :]:
        if word.start >= group.end:
            gap = clause[end : word.start]
            measure = word.place.grade or word.place.size_mm
            if not (WITHIN if behind else _TO_PLACE).fullmatch(gap):
                break
            if not measure and _opens_statement(clause, gap, word.end, bool(behind)):
                break
        behind.append(word)
        end = max(end, word.end)
    if group.mentions[0].label == "Cardiomegaly":  # "the heart is large" says that it is, not how large
        behind = [word for word in behind if word.start >= group.end or clause[word.start : word.end] != "large"]
    first, second = read_places(before, clause), read_places(behind, clause)
    more = any(word.name == "more" for word in behind)
    group.places = _combined(first, second, more)
    group.before = any(place.side or place.zone for place in first)
    group.behind = not group.before and any(place.side or place.zone for place in second)


def _last_row(clause: str, words: Sequence[Word]) -> list[Word]:
    """The words that belong together at the end: not the first of "mild crowding and right basilar opacity"."""
    for i in reversed(range(1, len(words))):
        gap = words[i - 1].end, words[i].start
        if JOIN.search(clause, *gap) and not WITHIN.fullmatch(clause, *gap):
            return list(words[i:])
    return list(words)


def _opens_statement(clause: str, gap: str, end: int, follows: bool) -> bool:
    """Whether a side is where the next statement begins ("..., right lung is clear") and not where a finding lies."""
    if follows:
        return bool(re.search(r"\b(?:is|are)\b", gap) or _CLEAR.match(clause, end))
    return not _PREPOSITION.search(gap) and bool(_SUBJECT.match(clause, end))


def _combined(first: list[Place], second: list[Place], more: bool) -> list[Place]:
    """The places before a mention with those behind it."""
    if not first or not second:
        return first or second
    if len(first) > 1:
        return first
    (own,) = first
    if more:
        return [own._replace(side="both").filled(second[0])]
    if own.side == "both" and {place.side for place in second} == {"left", "right"}:  # "both, larger on the left"
        return [place.filled(own._replace(side="")) for place in second]
    fitting = [place for place in second if not own.side or place.side in ("", own.side)]
    return [own.filled(place) for place in fitting] or first


def _preposed(clause: str, group: _Group, words: Sequence[Word]) -> None:
    """The place that opens a statement: "in the left lower lobe is a nodule", "both lung bases show atelectasis"."""
    if group.sided or group.device or group.absent:
        return
    row: list[Word] = []
    for word in words:
        if row and not WITHIN.fullmatch(clause, row[-1].end, word.start):
            row = []
        row.append(word)
    if row and not _NOTHING_THERE.search(clause, row[-1].end, group.start):
        group.fill(read_places(row, clause))


def _announced(before: str, clause: str) -> list[Place]:
    """The place that the clause before, which has no finding, announces ("on the left,", "right lung:")."""
    words = find_words(before)
    opens = _PREPOSED.match(before) or WITHIN.fullmatch(_rest(before, words)) or clause.startswith("which")
    return read_places(words, before) if opens and not _NOTHING_THERE.search(before) else []


def _rest(clause: str, words: Sequence[Word]) -> str:
    """The clause without its words that describe."""
    ends = [0, *(word.end for word in words)]
    starts = [*(word.start for word in words), len(clause)]
    return "".join(clause[end:start] for end, start in zip(ends, starts, strict=True))


def _share(clause: str, first: _Group, second: _Group) -> None:
    """Hand the place of one finding on to the next, where the words between them say so."""
    between = clause[first.end : second.start]
    explains = _EXPLAINS.search(between) is not None
    if explains:
        own = {mention.label for mention in first.mentions}
        same = first.mentions[0].state
        first.explained_by |= {m.label for m in second.mentions if m.state == same or m.label in own & {"Edema"}}
    apart = first.device or second.device or first.normal or second.normal or first.absent != second.absent
    if apart or second.sided or not first.places:
        return
    if explains or _OFFERS.search(between) or (_one_breath_list(between) and first.before):
        second.take(first.places)
    elif _BESIDE.search(between):
        second.take([Place(place.side) for place in first.places])


def _one_breath_list(between: str) -> bool:
    """Whether only a comma, "and", "or" and adjectives stand between two findings: no new noun phrase begins."""
    return JOIN.search(between) is not None and _BREAK.search(between) is None


# ------------------------------------------------------------------------------------------ facts of a clause


def _clause_facts(clause: str, groups: Sequence[_Group]) -> Iterator[Fact]:
    named = {mention.label for group in groups for mention in group.mentions if mention.field == "mentions"}
    devices = sum(mention.label == "Support Devices" for group in groups for mention in group.mentions)
    found: list[Fact] = []
    changes = find_changes(clause)
    for i, group in enumerate(groups):
        change = _change(changes, *_window(clause, groups, i)) if changes else ""
        labels = {mention.label for mention in group.mentions if mention.state == PRESENT} | group.explained_by
        for mention in group.mentions:
            if mention.label == OTHER or (mention.field != "mentions" and mention.label in named):
                continue
            if mention.state == ABSENT and _RESTRICTED.search(clause, _window(clause, groups, i)[0], mention.end):
                continue
            if devices > 1 and clause.startswith("tip", mention.start):  # it ends one of the others
                continue
            if mention.label == "Lung Opacity" and mention.state == PRESENT and labels & set(OPACITIES):
                continue
            if mention.label == "Edema" and "Edema" in group.explained_by:  # "indistinct vessels may represent edema"
                continue
            found += _mention_facts(mention, group.places, _kinds(clause, groups, i, mention), change)
    found = list(dict.fromkeys(found))
    for fact in found:
        if not any(fact != other and _says_no_more(fact, other) for other in found):
            yield fact


def _says_no_more(fact: Fact, other: Fact) -> bool:
    """Whether one statement of a clause is another one cut short: "leads" beside a "left pacemaker"."""
    said = zip(fact[2:7], other[2:7], strict=True)
    open_kind = fact.kind != other.kind and other.kind in _LEFT_OPEN  # "congestion with edema" says both
    return fact[:2] == other[:2] and not open_kind and all(not mine or mine == theirs for mine, theirs in said)


def _mention_facts(mention: Mention, places: Sequence[Place], kinds: Sequence[str], change: str) -> Iterator[Fact]:
    label, state = mention.label, STATES[mention.state]
    if mention.field == "normals":
        yield Fact(label, state)
        return
    places = places or [Place()]
    if mention.field == "hints":  # how blunt the angle is, not how much fluid there is
        places = [place.where for place in places]
    paired = len(kinds) == len(places)  # "left clavicle and right rib fractures"
    for i, kind in enumerate(kinds):
        for place in [places[i]] if paired else places:
            if label in SIDELESS:
                place = Place(grade=place.grade)
            elif label == "Support Devices":
                place = Place(place.side, place.zone if kind == "chest tube" else "")
            yield Fact(label, state, kind, *place, change)


def _window(clause: str, groups: Sequence[_Group], i: int) -> tuple[int, int]:
    """From the end of the finding before (or the first "and" behind it) to the noun phrase of the next one."""
    start = groups[i - 1].end if i else 0
    joined = JOIN.search(clause, start, groups[i].start) if i else None
    return joined.end() if joined else start, groups[i + 1].head if i + 1 < len(groups) else len(clause)


def _kinds(clause: str, groups: Sequence[_Group], i: int, mention: Mention) -> list[str]:
    """The kinds of a mention: by its own words, else those before it, else those behind it; [""] without any."""
    if mention.label not in _KINDS:
        return [""]
    start, end = _window(clause, groups, i)
    start, end = max(start, mention.start - _REACH), min(end, mention.end + _REACH)
    own = min(groups[i].end, end)
    spans = ((mention.start, mention.end), (start, own), (own, end))
    tables = [_KINDS[mention.label], *([_BY_TELLTALE] if mention.label == "Support Devices" else [])]
    for names, pattern in tables:
        for span in spans:
            found = [names[int((match.lastgroup or "k0")[1:])] for match in pattern.finditer(clause, *span)]
            if found:
                return [kind for kind in dict.fromkeys(found) if kind != "central line" or not _VENOUS & set(found)]
    return [""]


def _change(changes: Sequence[tuple[int, str]], start: int, end: int) -> str:
    """The change that a finding's own words tell, else the only one that its clause does."""
    own = {name for at, name in changes if start <= at < end} or {name for _, name in changes}
    return own.pop() if len(own) == 1 else ""
