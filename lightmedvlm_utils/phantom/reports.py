"""Radiology reports for phantom studies: what the findings say, in the form MIMIC-CXR stores it.

The medical content of a report follows from `Study.findings` alone (label, side, zone, size, severity,
certainty); the random generator only chooses wording, order, which normal statements are spelled out, and the
defects of the file (missing sections, wet reads, addenda, typos, empty reports).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .phrases import absent_sentences, hedged_sentence, impression_phrase, present_sentence, volume_sentence

if TYPE_CHECKING:
    from .patients import Finding, Study

# Share of each file layout. `impression only`, `empty` and `no sections` cannot serve as report-generation
# targets: together they stay well under 12 % so that the bulk of the data set is usable.
LAYOUTS = {
    "standard": 0.775,
    "wet read": 0.05,
    "addendum": 0.03,
    "amended": 0.02,
    "one section": 0.02,
    "no headings": 0.025,
    "findings only": 0.035,
    "impression only": 0.025,
    "empty": 0.01,
    "no sections": 0.01,
}
TYPO_RATE = 0.03  # share of reports with one misspelled word
PRIOR_RATE = 0.25  # share of follow-up reports that compare with the earlier study

_ORDERS = (  # order of the organ systems in the findings section
    ("devices", "heart", "lungs", "pleura", "bones"),
    ("lungs", "pleura", "heart", "bones", "devices"),
    ("heart", "lungs", "pleura", "bones", "devices"),
)
_SYSTEM = {
    "Support Devices": "devices",
    "Cardiomegaly": "heart",
    "Enlarged Cardiomediastinum": "heart",
    "Pleural Effusion": "pleura",
    "Pneumothorax": "pleura",
    "Pleural Other": "pleura",
    "Fracture": "bones",
}  # every other label belongs to "lungs"
_REASONS = (
    "cough and fever",
    "shortness of breath",
    "chest pain",
    "fall",
    "weakness",
    "fever, evaluate for pneumonia",
    "dyspnea, evaluate for edema or effusion",
    "line placement",
    "trauma, evaluate for pneumothorax",
)
_NORMAL_IMPRESSIONS = ("No acute cardiopulmonary process.", "No acute cardiopulmonary abnormality.")
_INDENT = " " * 33


def write_report(study: Study, rng: np.random.Generator, prior: Study | None = None) -> str:
    """Return the full text of one report file, headings included; "" for the empty ones.

    `prior` is the patient's earlier study: with it, some findings are compared with it, truthfully.
    """
    layout = str(rng.choice(list(LAYOUTS), p=list(LAYOUTS.values())))
    if layout == "empty":
        return ""
    findings = write_findings(study, rng, prior)
    impression = write_impression(study, rng)
    if rng.random() < TYPO_RATE:
        findings = misspell(findings, rng)
    return _LAYOUT_WRITERS[layout](_preamble(study, rng, prior), findings, impression, rng)


def write_findings(study: Study, rng: np.random.Generator, prior: Study | None = None) -> str:
    """Return the findings paragraph: every finding once, then some of the absent ones, by organ system."""
    return " ".join(sentence for sentence, _ in findings_sentences(study, rng, prior))


def findings_sentences(
    study: Study, rng: np.random.Generator, prior: Study | None = None
) -> list[tuple[str, Finding | None]]:
    """Return the sentences of the findings paragraph, each with the finding that it states, None for the others."""
    compared = prior if prior is not None and rng.random() < PRIOR_RATE else None
    by_system: dict[str, list[tuple[str, Finding | None]]] = {system: [] for system in _ORDERS[0]}
    for finding in study.findings:
        change = _change(finding, compared) if compared else ""
        phrase = hedged_sentence if finding.state == -1 else present_sentence
        by_system[_SYSTEM.get(finding.label, "lungs")].append((phrase(finding, rng, change), finding))
    mentioned = {finding.label for finding in study.findings}
    by_system["lungs"].append((volume_sentence(study.inspiration, rng), None))
    for system, sentence in absent_sentences(mentioned, rng):
        by_system[system].append((sentence, None))
    order = _ORDERS[rng.choice(len(_ORDERS), p=(0.4, 0.3, 0.3))]
    return [pair for system in order for pair in by_system[system] if pair[0]]


def write_impression(study: Study, rng: np.random.Generator) -> str:
    """Return the impression: the positive findings once more, briefly, one per line where numbered."""
    items = impression_items(study.findings)
    if not items:
        return str(rng.choice(_NORMAL_IMPRESSIONS))
    if len(items) > 1 and rng.random() < 0.4:
        return "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
    return " ".join(items)


def impression_items(findings: Sequence[Finding]) -> list[str]:
    """Return the statements of an impression about findings, certain ones first; devices have none."""
    ranked = sorted(findings, key=lambda finding: -finding.state)  # stable
    items = [impression_phrase(finding) for finding in ranked if finding.label != "Support Devices"]
    return list(dict.fromkeys(items))


def misspell(text: str, rng: np.random.Generator) -> str:
    """Swap two inner letters of one word of six letters or more, as hurried typing does."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if len(word) >= 6 and word.isalpha()]
    if not long_words:
        return text
    index = int(rng.choice(long_words))
    word = words[index]
    at = int(rng.integers(1, len(word) - 2))
    words[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def _change(finding: Finding, prior: Study) -> str:
    """Return "new", "increased", "decreased" or "unchanged" against the prior study's same finding."""
    before = [old for old in prior.findings if (old.label, old.side) == (finding.label, finding.side)]
    if not before:
        return "new"
    difference = finding.severity - max(old.severity for old in before)
    if abs(difference) < 0.12:
        return "unchanged"
    return "increased" if difference > 0 else "decreased"


# ---------------------------------------------------------------------------------------- file layouts


def _preamble(study: Study, rng: np.random.Generator, prior: Study | None) -> list[str]:
    """Return the sections before FINDINGS: examination, indication, technique, comparison."""
    positions = [view.position for view in study.views]
    portable = "AP" in positions
    examination = "CHEST (PORTABLE AP)" if portable else "CHEST (PA AND LAT)"
    technique = "Portable AP view of the chest." if portable else "Chest PA and lateral."
    person = "woman" if str(study.sex).upper().startswith("F") else "man"
    if rng.random() < 0.3:
        person = person[0].replace("w", "F").replace("m", "M")
        indication = f"___{person} with {rng.choice(_REASONS)}"
    else:
        indication = f"___ year old {person} with {rng.choice(_REASONS)}."
    comparison = "None." if prior is None else str(rng.choice(["___", "Chest radiograph from ___."]))
    heading = "INDICATION" if rng.random() < 0.8 else "HISTORY"
    return [
        f"EXAMINATION:  {examination}",
        f"{heading}:  {indication}",
        f"TECHNIQUE:  {technique}",
        f"COMPARISON:  {comparison}",
    ]


def _section(heading: str, text: str) -> str:
    """Return a heading and its text, wrapped at 78 columns with MIMIC's one-space margin."""
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, 78, break_on_hyphens=False)]
    return f" {heading}: \n \n" + "\n".join(f" {line}" for line in lines)


def _paragraph(text: str) -> str:
    return "\n".join(f" {line}" for line in textwrap.wrap(text.replace("\n", " "), 78, break_on_hyphens=False))


def _document(blocks: list[str], title: str = "FINAL REPORT") -> str:
    body = "\n \n".join(block if block.startswith(" ") else f" {block}" for block in blocks)
    return f"{_INDENT}{title}\n{body}\n"


def _standard(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.05:
        impression += "\n" if impression[0] == "1" else " "
        impression += "Findings were discussed with Dr. ___ by phone at 9:40 a.m. on ___."
    return _document([*preamble, _section("FINDINGS", findings), _section("IMPRESSION", impression)])


def _wet_read(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    # The first look, before the final report: only its first item, and it may be worded otherwise later.
    first = impression.split("\n")[0].removeprefix("1. ").split(". ")[0].rstrip(".")
    wet = f" WET READ: ___ ___ ___ {rng.integers(1, 12)}:{rng.integers(10, 59)} PM\n  {first}. \n {'_' * 70}\n"
    return wet + _standard(preamble, findings, impression, rng)


def _addendum(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    note = "These results were telephoned to Dr. ___ by Dr. ___ at 3:15 p.m. on ___."
    return _standard(preamble, findings, impression, rng) + "\n" + _section("ADDENDUM", note) + "\n"


def _amended(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    # Two FINDINGS sections in one file: the draft is superseded by the one that follows.
    draft = _section("FINDINGS", "Preliminary review. Final interpretation is pending.")
    final = [_section("FINDINGS", findings), _section("IMPRESSION", impression)]
    return _document([*preamble, draft, *final])


def _one_section(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    return _document([*preamble, _section("FINDINGS AND IMPRESSION", findings)])


def _no_headings(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    return f"{_INDENT}FINAL REPORT\n{_paragraph(findings)}\n"


def _findings_only(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    return _document([*preamble, _section("FINDINGS", findings)])


def _impression_only(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    return _document([*preamble, _section("IMPRESSION", impression)])


def _no_sections(preamble: list[str], findings: str, impression: str, rng: np.random.Generator) -> str:
    return _document([*preamble])


_LAYOUT_WRITERS = {
    "standard": _standard,
    "wet read": _wet_read,
    "addendum": _addendum,
    "amended": _amended,
    "one section": _one_section,
    "no headings": _no_headings,
    "findings only": _findings_only,
    "impression only": _impression_only,
    "no sections": _no_sections,
}
