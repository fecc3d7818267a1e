"""The fact score: what two reports say of the patient, compared fact by fact, whatever the words.

What is compared are the different things that a report asserts or suspects (`data.facts`), one side each, so that
"bilateral effusions" and "left effusion. Right effusion." are the same two. A thing counts for less with everything
that the reference says of it and the hypothesis does not get right (`credit`).

Denials are no facts here: a report that says "no effusion" and one that is silent about it describe the same patient,
and which of the many normal statements are spelled out is habit. If they counted, they would outnumber the findings
and reward whoever recites them; a finding that is denied wrongly is a miss all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from lightmedvlm_utils.data.facts import Fact, compares_with_prior, contradictions, read_facts, same_kind
from lightmedvlm_utils.data.places import grade_step, same_zone
from lightmedvlm_utils.evaluation.metrics import Draws, ratio

SIZE_TOLERANCE = 1.25  # a measurement this many times larger or smaller counts as the same
# What goes without saying: an effusion lies at the base, an edema in both lungs. Who says so has not said more.
_BASAL, _BILATERAL = ("Pleural Effusion",), ("Edema",)
_ONE_OF_MANY = ("Support Devices", "Fracture")  # their kinds have sides of their own


class FactCounts(NamedTuple):
    """What the metrics of a pair of reports are ratios of."""

    credit: float  # of the pairs of facts, each 0 to 1
    expected: int  # facts of the reference
    proposed: int  # facts of the hypothesis
    same_side: int  # findings that both reports name on one side, and on the same
    one_sided: int  # findings that both reports name on one side
    contradictory: bool  # whether the hypothesis contradicts itself
    invented_prior: bool  # whether it compares with an earlier study and the reference does not
    without_prior: bool  # whether the reference does not


def fact_draws(references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray) -> Draws:
    """Agreement in facts, per bootstrap draw; NaN where there is nothing to divide by.

    "fact_precision", "fact_recall", "fact_f1": summed credit over the facts of the hypotheses, of the references, of
    both (micro, over all studies). "side_right": of the findings that both reports name on one side only, the share on
    the same. "contradictions": share of hypotheses that contradict themselves. "invented_priors": of the studies whose
    reference compares with no earlier study, the share whose hypothesis does (the model has seen none).
    """
    pairs = zip(references, hypotheses, strict=True)
    rows = np.array([fact_counts(*pair) for pair in pairs], float).reshape(-1, len(FactCounts._fields))
    total = dict(zip(FactCounts._fields, (weights @ rows).T, strict=True))
    return {
        "fact_f1": ratio(2 * total["credit"], total["expected"] + total["proposed"]),
        "fact_precision": ratio(total["credit"], total["proposed"]),
        "fact_recall": ratio(total["credit"], total["expected"]),
        "side_right": ratio(total["same_side"], total["one_sided"]),
        "contradictions": ratio(total["contradictory"], weights.sum(1)),
        "invented_priors": ratio(total["invented_prior"], total["without_prior"]),
    }


def fact_counts(reference: str, hypothesis: str) -> FactCounts:
    """Compare two reports of one study."""
    own = read_facts(hypothesis)
    expected, proposed = things(read_facts(reference)), things(own)
    sides = [_one_sided(facts) for facts in (expected, proposed)]
    common = sides[0].keys() & sides[1].keys()
    without = not compares_with_prior(reference)
    return FactCounts(
        credit=sum(pair.credit for pair in matched(expected, proposed)),
        expected=len(expected),
        proposed=len(proposed),
        same_side=sum(sides[0][name] == sides[1][name] for name in common),
        one_sided=len(common),
        contradictory=bool(contradictions(own)),
        invented_prior=without and compares_with_prior(hypothesis),
        without_prior=without,
    )


def things(facts: Sequence[Fact]) -> list[Fact]:
    """The different things that statements assert or suspect, whatever their order, one side each.

    Statements that differ in nothing that both of them say are of one thing, which has all that they say: "left
    effusion" and "small effusion" are a small left effusion. Called present once and uncertain once, it is present.
    """
    halves = {half for fact in facts if fact.state != "absent" for half in _halves(fact)}
    found: list[Fact] = []
    for fact in sorted(halves, key=_detail):
        for i, other in enumerate(found):
            if _compatible(fact, other):
                state = "present" if "present" in (fact.state, other.state) else "uncertain"
                more = {name: said for name, said in fact._asdict().items() if not getattr(other, name)}
                found[i] = other._replace(state=state, **more)
                break
        else:
            found.append(fact)
    return found


def _detail(fact: Fact) -> tuple:
    """Sorts the statements that say most first, and those that say equally much in a fixed order."""
    return -sum(map(bool, fact[2:])), tuple(map(str, fact))


def _halves(fact: Fact) -> list[Fact]:
    fact = fact._replace(change="", section="")
    if fact.finding in _BASAL:
        fact = fact._replace(zone="")
    if fact.finding in _BILATERAL and fact.side == "both":
        fact = fact._replace(side="")
    return [fact._replace(side=side) for side in (("left", "right") if fact.side == "both" else (fact.side,))]


def _compatible(a: Fact, b: Fact) -> bool:
    return (
        same_kind(a, b)
        and (not a.side or not b.side or a.side == b.side)
        and (not a.zone or not b.zone or same_zone(a.zone, b.zone))
        and (not a.grade or not b.grade or grade_step(a.grade) == grade_step(b.grade))
        and (not a.size_mm or not b.size_mm or a.size_mm == b.size_mm)
    )


def credit(reference: Fact, hypothesis: Fact) -> float:
    """1 where the hypothesis says all that the reference says; half for each of state, side, zone, grade and measured
    size that it leaves out or gets wrong; 0 for another finding or another kind of it.

    >>> left, right = (Fact("Pleural Effusion", "present", side=side, grade="small") for side in ("left", "right"))
    >>> credit(left, left), credit(left, right), credit(left, right._replace(grade=""))
    (1.0, 0.5, 0.25)
    """
    if not same_kind(reference, hypothesis):
        return 0.0
    wrong = [reference.state != hypothesis.state]
    if reference.side:
        wrong.append(reference.side != hypothesis.side)
    if reference.zone:
        wrong.append(not same_zone(reference.zone, hypothesis.zone))
    if reference.grade:
        wrong.append(not hypothesis.grade or grade_step(reference.grade) != grade_step(hypothesis.grade))
    if reference.size_mm:
        small, large = sorted((reference.size_mm, hypothesis.size_mm or 0.0))
        wrong.append(large > SIZE_TOLERANCE * small)
    return 0.5 ** sum(wrong)


class Match(NamedTuple):
    """A fact of the reference, the fact of the hypothesis that answers to it, and what it is worth."""

    reference: Fact
    hypothesis: Fact
    credit: float


def matched(expected: Sequence[Fact], proposed: Sequence[Fact]) -> list[Match]:
    """Pair facts so that the summed credit is largest; each is used at most once, pairs worth nothing are left out."""
    credits = np.array([[credit(fact, other) for other in proposed] for fact in expected])
    if not credits.any():
        return []
    rows, columns = linear_sum_assignment(credits, maximize=True)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [Match(expected[i], proposed[j], float(credits[i, j])) for i, j in pairs if credits[i, j]]


def _one_sided(facts: Sequence[Fact]) -> dict[tuple[str, str], str]:
    """Side of each finding that is named on one side only, by finding and, for devices and fractures, kind."""
    sides: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        name = fact.finding, fact.kind if fact.finding in _ONE_OF_MANY else ""
        sides.setdefault(name, set()).add(fact.side)
    return {name: side for name, found in sides.items() for side in found if len(found) == 1 and side}
