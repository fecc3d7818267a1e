"""How a finding is described, as a row of numbers: which of a fixed list of words a report says of each label.

That is what a connector can be taught to tell beside "present" and "absent": on which side, where, how much, of which
kind. The words are those that `facts` reads, whatever the report's own wording.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightmedvlm_utils.data.facts import KINDS, Fact, read_facts
from lightmedvlm_utils.data.places import AMOUNTS, SEVERITIES
from lightmedvlm_utils.observations import LABELS

# Of each of the first three groups a finding has one word at most (several findings of a label share them out); of the
# kinds it may have many.
GROUPS: dict[str, tuple[str, ...]] = {
    "side": ("left", "right", "bilateral"),
    "zone": ("apical", "upper", "mid", "lower", "basal"),
    "grade": tuple(dict.fromkeys([*AMOUNTS, *SEVERITIES])),
    "kind": tuple(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds)),
}
WORDS = tuple(word for words in GROUPS.values() for word in words)
_PLACE = {word: place for place, word in enumerate(WORDS)}
_ROW = {label: row for row, label in enumerate(LABELS)}


def group_slices() -> dict[str, slice]:
    """Where each group's words stand in WORDS."""
    ends = np.cumsum([len(words) for words in GROUPS.values()])
    return {
        name: slice(int(end) - len(words), int(end)) for (name, words), end in zip(GROUPS.items(), ends, strict=True)
    }


def describe(report: str) -> np.ndarray:
    """(14, W): what a report says of each label that it asserts or suspects. In each group of one word the words said
    share 1 among them; a kind that is said has 1; what is not said is 0 throughout.

    >>> describe("Small left effusion.")[LABELS.index("Pleural Effusion")][list(map(WORDS.index, ("left", "small")))]
    array([1., 1.], dtype=float32)
    """
    return describe_facts(read_facts(report))


def describe_facts(facts: Sequence[Fact]) -> np.ndarray:
    """(14, W) of what is read from a report, as `describe`."""
    said = np.zeros((len(LABELS), len(WORDS)), np.float32)
    for label in {fact.finding for fact in facts if fact.state != "absent"}:
        own = [fact for fact in facts if fact.finding == label and fact.state != "absent"]
        row = said[_ROW[label]]
        sides = {fact.side for fact in own} - {""}
        if sides:
            row[_PLACE["bilateral" if len(sides) > 1 or "both" in sides else sides.pop()]] = 1
        for names in ({fact.zone for fact in own}, {fact.grade for fact in own}):
            for name in names - {""}:
                row[_PLACE[name]] = 1 / len(names - {""})
        for kind in {fact.kind for fact in own} - {""}:
            row[_PLACE[kind]] = 1
    return said
