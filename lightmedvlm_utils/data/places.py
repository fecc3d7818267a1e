"""Where a finding lies and how large it is, from the words around it: sides, zones, grades and measurements.

`find_words` finds the words that describe in a clause, `read_places` makes places of those that belong together. Which
finding they describe is the business of `facts`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# The four steps of an amount and of a severity, smallest first.
AMOUNTS, SEVERITIES = ("tiny", "small", "moderate", "large"), ("minimal", "mild", "moderate", "severe")
_REGION = {"apical": "upper", "basal": "lower"}

_GRADES = {
    "tiny": "tiny|trace|minute|minuscule|miniscule",
    "minimal": "minimal(?:ly)?|slight(?:ly)?|trivial|subtle",
    "small": "small|little",
    "mild": "mild(?:ly)?",
    "moderate": "moderate(?:ly)?|significant(?:ly)?|substantial(?:ly)?|overt|frank",
    "large": "large|massive|huge|sizable|extensive",
    "severe": "severe(?:ly)?|marked(?:ly)?|gross(?:ly)?",
}
_GRADE = "|".join(_GRADES.values())
# Not how large the finding is, but how much it has changed, how thick a tube is, how far a bone has moved.
_NO_GRADE = (
    r"(?![\w\s-]{0,14}\b(?:interval|increas|decreas|improv|worse|progress|chang|bore|clear|normal|stable|displac|"
    r"angulat))"
)
_SHORT = r"(?= (?:lung|pleural|effusion|ptx|pneumothorax|ij|sc|subclavian|picc|port|chest|upper|mid|lower|base|apex)\b)"
_LATERAL = r"(?:[- ]?sided)?\b(?! lateral (?:decub|view|film|proj)| anterior obl| in (?:place|situ))"
_MORE = (
    r"(?:greater|more|larger|bigger|worse|higher)(?: (?:pronounced|prominent|severe|marked|so|extensive|evident))?"
    r"[- ](?:than|on|in|at)(?: on| in| at)?(?: the)?[- ](?:left|right)\b"
)
# Sides and levels that are no place of a finding: a tube in the right main bronchus is no finding of the right lung.
_ELSEWHERE = (
    r"(?:left|right)[- ](?:sided )?(?:(?:heart )?(?:atri|ventric)\w+|main\w*|(?:main )?bronch\w+|"
    r"brachiocephalic|innominate|pulmonary arter\w+|(?:upper |lower )?(?:quadrant|abdom\w+)|aort\w+)|"
    r"(?:upper|lower) (?:limits?|quadrant|abdom\w+|extremit\w+|mediast\w+|svc|superior|thoracic|cervical|lumbar|"
    r"trachea|esophag\w+|poles?)|mid(?:dle)?[- ](?:svc|thoracic|trachea|mediast\w+|esophag\w+|abdom\w+)|"
    r"(?:base|apex) of (?:the )?(?:heart|neck|skull)|(?:skull|cardiac|heart) (?:base|apex)|apical lordotic"
)
_PAIRED = r"(?:lungs|bases|apices|sides|hemithora\w+|lobes|zones|fields|hila|angles|sulci|walls|clavicles|ribs)"
_WORD = re.compile(
    rf"> ?(?P<than>left|right)\b|\b(?=[abcefghlmorstuw\d])(?:(?P<elsewhere>{_ELSEWHERE})|(?P<more>{_MORE})"
    rf"|(?P<grade>(?:(?:{_GRADE})(?:[- ](?:to|or)[- ]|/|-))?(?:{_GRADE})\b{_NO_GRADE})"
    r"|(?P<size>(?:\d+(?:\.\d+)?[\s-]*(?:[cm]m)?\s*(?:x|by)\s*)*\d+(?:\.\d+)?[\s-]*(?:[cm]m|(?:centi|milli)meters?)\b)"
    rf"|(?P<both>bilat(?:eral(?:ly)?)?\b|b/l\b|both\b(?=(?: [\w-]+){{0,3}}? {_PAIRED}))"
    r"|(?P<heart>(?:left|right)(?:[- ]sided)? heart(?! border))"
    rf"|(?P<left>left{_LATERAL}|lt\b|l{_SHORT})|(?P<right>right{_LATERAL}|rt\b|r{_SHORT})"
    r"|(?P<named>(?:bases|apices|bas(?:e|al|ilar)|apex|apical|bibas(?:al|ilar)|biapical|[lr][lu]l|rml|lower|upper|"
    r"middle lobe|retrocardiac)\b|lingula|mid(?:dle)?(?=\b|lung)))"
)
# Side and zone of the words of the last group.
_NAMED = {
    "apices": ("", "apical"), "apex": ("", "apical"), "apical": ("", "apical"), "biapical": ("both", "apical"),
    "bases": ("", "basal"), "base": ("", "basal"), "basal": ("", "basal"), "basilar": ("", "basal"),
    "bibasal": ("both", "basal"), "bibasilar": ("both", "basal"), "upper": ("", "upper"), "lower": ("", "lower"),
    "retrocardiac": ("", "lower"), "mid": ("", "mid"), "middle": ("", "mid"), "middle lobe": ("", "mid"),
    "lingula": ("", "mid"), "lul": ("left", "upper"), "lll": ("left", "lower"), "rul": ("right", "upper"),
    "rml": ("right", "mid"), "rll": ("right", "lower"),
}  # fmt: skip
_OWN_SIDE = {"middle lobe": "right", "lingula": "left"}  # lobes that one lung has: their side where none is named
_PLURAL = ("bases", "apices")  # of both lungs, where no side is named

JOIN = re.compile(r",|/|&|\b(?:and|or|plus|versus|vs)\b")
# What may stand between the words of one place.
WITHIN = re.compile(
    r"(?:[\s,/&()-]|\b(?:the|and|or|plus|of|in|at|on|to|is|are|lobes?|lungs?|zones?|fields?|sides?|aspects?|portions?|"
    r"regions?|segments?|posterior|anterior|lateral|medial|posterolateral|costophrenic|sulc\w+|angles?|hemithora\w+|"
    r"pleura\w*|chest|walls?|ribs?|clavicles?|\w*hilar|(?:one-)?thirds?|half|shaft|"
    r"measur\w+|approximately|about|up|maximum|greatest|width|diameter|size|dimension|thickness|"
    r"\d{1,2}(?:st|nd|rd|th)?|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth)\b)*"
)
_NOUN = re.compile(r"\b(?:lungs?|hemithorax|chest|sides?)\b")


class Place(NamedTuple):
    """Side, zone, grade and measured size, each as `facts.Fact` has them."""

    side: str = ""
    zone: str = ""
    grade: str = ""
    size_mm: float | None = None

    def filled(self, other: Place) -> Place:
        """What is not said here is taken from `other`."""
        return Place(
            self.side or other.side, self.zone or other.zone, self.grade or other.grade, self.size_mm or other.size_mm
        )

    @property
    def where(self) -> Place:
        return Place(self.side, self.zone)


class Word(NamedTuple):
    """Words that describe, `clause[start:end]`; `name` is their group in `_WORD` or, of the last one, themselves."""

    start: int
    end: int
    name: str
    place: Place


def find_words(clause: str) -> list[Word]:
    """The words of a lower-case clause that tell a side, a zone, a grade or a size.

    >>> [word.name for word in find_words("small left effusion, bases clear, lead in the right ventricle")]
    ['grade', 'left', 'bases']
    """
    found = []
    for match in _WORD.finditer(clause):
        name, text = match.lastgroup or "", match[0]
        if name == "elsewhere":
            continue
        if name == "grade":
            place = Place(grade=_grade(text))
        elif name == "size":
            place = Place(size_mm=_millimeters(text))
        elif name == "named":
            name, place = text, Place(*_NAMED[text])
        elif name == "heart":
            place = Place(text.split("-")[0].split()[0])
        else:
            name = "more" if name == "than" else name
            place = Place("both" if name == "more" else name)
        found.append(Word(*match.span(), name, place))
    return found


def _grade(text: str) -> str:
    """The grade that a word stands for; of "mild to moderate" the larger."""
    last = re.split(r"[- ](?:to|or)[- ]|/|-", text)[-1]
    return next(grade for grade, pattern in _GRADES.items() if re.fullmatch(pattern, last))


def _millimeters(text: str) -> float:
    largest = max(map(float, re.findall(r"\d+(?:\.\d+)?", text)))
    return round(largest * (1 if re.search(r"mm$|milli", text) else 10), 3)


def read_places(words: Sequence[Word], clause: str) -> list[Place]:
    """The places that words in a row name; [] without a word.

    >>> clause = "small left upper and right lower"
    >>> [tuple(place)[:3] for place in read_places(find_words(clause), clause)]
    [('left', 'upper', 'small'), ('right', 'lower', 'small')]
    """
    places: list[Place] = []
    own: list[Place] = []  # the sides that go without saying
    whole: list[bool] = []  # whether a noun closes the place before: "right lung and left base"
    end = 0
    for word in words:
        joined, side = JOIN.search(clause, end, word.start) is not None, Place(_OWN_SIDE.get(word.name, ""))
        closed = _NOUN.search(clause, end, word.start) is not None
        end = word.end
        if places and not _opens_another(places[-1].filled(own[-1]), word, word.place.filled(side), joined):
            places[-1], own[-1] = word.place.filled(places[-1]), own[-1].filled(side)
        else:
            places.append(word.place)
            own.append(side)
            whole.append(closed)
    places = [place.filled(side) for place, side in zip(places, own, strict=True)]
    for i in range(1, len(places)):  # "small left and right": both small
        places[i] = places[i].filled(Place(places[i - 1].side, "", places[i - 1].grade))
    for i in reversed(range(len(places) - 1)):  # "left and right lower": both lower
        places[i] = places[i].filled(Place(places[i + 1].side) if whole[i + 1] else places[i + 1].where)
    if any(word.name in _PLURAL for word in words):
        places = [place.filled(Place("both")) for place in places]
    return list(dict.fromkeys(places))


def _opens_another(so_far: Place, word: Word, says: Place, joined: bool) -> bool:
    """Whether a word belongs to another place than the words before it."""
    if word.name in ("more", "both"):
        return False
    twice = [(mine, theirs) for mine, theirs in zip(so_far, says, strict=True) if mine and theirs]
    if joined:
        return bool(twice)
    # One place: "left middle lobe", "lower lobe base"; one size: "moderately large"; two: "left upper right lower".
    clash = any(mine != theirs for mine, theirs in twice)
    return clash and not says.grade and word.name not in _OWN_SIDE and not same_zone(so_far.zone, says.zone)


def same_zone(a: str, b: str) -> bool:
    """Whether two zones that are said are one: the apex is an upper zone, the base a lower one."""
    return a != "" and _REGION.get(a, a) == _REGION.get(b, b)


def grade_step(grade: str) -> int:
    """0 (tiny, minimal) to 3 (large, severe)."""
    return (AMOUNTS if grade in AMOUNTS else SEVERITIES).index(grade)
