"""The language of phantom reports: one table of wordings per kind of finding, and of normal statements.

Words carry content only: side, zone, size, grade and certainty come from the `Finding`. The vocabulary is
kept small (a language model of two million parameters has to learn it from 2,500 reports).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightmedvlm_utils.observations import OPACITIES

if TYPE_CHECKING:
    from .patients import Finding


class Wording(NamedTuple):
    """How one kind of finding is worded; `{grade}`, `{side}`, `{where}`, ... are filled from the finding."""

    noun: str  # noun phrase without article, e.g. "{amount} {side} pleural effusion"
    article: str = "a"  # "a" or "an" where singular nouns take one, "" for mass nouns
    sentences: tuple[str, ...] = ()  # other definite statements than "There is <noun>."
    impression: str = ""  # short form; the noun phrase where empty
    hedges: tuple[str, ...] = ()  # other uncertain statements than "Possible <noun>."


WORDINGS = {
    "linear atelectasis": Wording(
        "linear atelectasis {where}",
        "",
        ("Linear atelectasis is seen {where}.", "Linear bands {where} represent atelectasis."),
        hedges=("A faint linear band {where} may represent atelectasis.",),
    ),
    "basal atelectasis": Wording(
        "{grade} atelectasis {where}",
        "",
        ("Volume loss {where} reflects {grade} atelectasis.", "{Grade} atelectasis is noted {where}."),
        hedges=("Subtle volume loss {where} may represent atelectasis.",),
    ),
    "lobar collapse": Wording(
        "{side} {lobe} collapse",
        "",
        (
            "{Side} {lobe} collapse with volume loss.",
            "The {side} {lobe} is collapsed.",
            "Volume loss reflects {side} {lobe} atelectasis.",
        ),
        hedges=("Subtle volume loss may represent {side} {lobe} atelectasis.",),
    ),
    "cardiomegaly": Wording(
        "{grade} cardiomegaly",
        "",
        (
            "The heart is {gradely} enlarged.",
            "Heart size is {gradely} enlarged.",
            "The cardiac silhouette is {gradely} enlarged.",
        ),
        hedges=("The heart size is borderline.", "The heart is borderline enlarged."),
    ),
    "lobar consolidation": Wording(
        "dense {side} {lobe} consolidation",
        "",
        (
            "{Side} {lobe} consolidation with air bronchograms.",
            "Dense consolidation in the {side} {lobe} contains air bronchograms.",
            "The {side} {lobe} is consolidated.",
        ),
        impression="{side} {lobe} consolidation",
        hedges=("Faint density in the {side} {lobe} may represent early consolidation.",),
    ),
    "interstitial edema": Wording(
        "{grade} interstitial edema",
        "",
        (
            "Septal lines and indistinct vessels reflect {grade} interstitial edema.",
            "{Grade} pulmonary vascular congestion with interstitial edema.",
        ),
        impression="{grade} pulmonary edema",
        hedges=("Slightly indistinct vessels may represent minimal edema.",),
    ),
    "alveolar edema": Wording(
        "{grade} alveolar edema",
        "",
        (
            "Perihilar haze in both lungs reflects {grade} alveolar edema.",
            "{Grade} pulmonary edema with perihilar haze.",
        ),
        impression="{grade} pulmonary edema",
        hedges=("Slight perihilar haze may represent minimal edema.",),
    ),
    "widened mediastinum": Wording(
        "{grade} widening of the mediastinum",
        "",
        ("The mediastinum is {gradely} widened.", "The upper mediastinum is {gradely} widened."),
        impression="widened mediastinum",
        hedges=("The mediastinum is borderline widened.",),
    ),
    "rib fracture": Wording(
        "{side} {zone} rib fracture",
        "a",
        ("Displaced fracture of a {side} {zone} rib.", "A {side} {zone} rib is fractured."),
    ),
    "clavicle fracture": Wording(
        "{side} clavicle fracture",
        "a",
        ("The {side} clavicle is fractured.", "Displaced fracture of the {side} clavicle."),
    ),
    "nodule": Wording(
        "{size} nodule {where}",
        "a",
        ("A nodule {where} measures {cm} cm.", "{size} pulmonary nodule {where}."),
        hedges=("A {size} nodular density {where} is questionable.",),
    ),
    "mass": Wording(
        "{size} mass {where}",
        "a",
        ("A mass {where} measures {cm} cm.", "{size} rounded lung mass {where}."),
        hedges=("A {size} rounded density {where} may represent a mass.",),
    ),
    "hazy opacity": Wording(
        "hazy opacity {where}",
        "a",
        ("An ill-defined hazy opacity is seen {where}.", "Ill-defined opacity {where}."),
        impression="{side} lung opacity",
    ),
    "pleural effusion": Wording(
        "{amount} {side} pleural effusion",
        "a",
        (
            "{Amount} {side} pleural effusion with blunting of the costophrenic angle.",
            "Blunting of the {side} costophrenic angle reflects a {amount} pleural effusion.",
            "{Amount} {side} pleural effusion is present.",
        ),
        hedges=("Slight blunting of the {side} costophrenic angle may represent a small effusion.",),
    ),
    "pleural thickening": Wording(
        "{side} pleural thickening",
        "",
        ("Pleural thickening is seen {wall}.", "{Side} pleura is thickened along the chest wall."),
    ),
    "pleural plaque": Wording(
        "calcified {side} pleural plaque",
        "a",
        ("A calcified pleural plaque is seen {wall}.", "Calcified {side} pleural plaque {wall}."),
    ),
    "apical cap": Wording(
        "{side} apical pleural thickening",
        "",
        ("Pleural thickening caps the {side} lung apex.", "{Side} apical pleural cap is noted."),
    ),
    "multifocal pneumonia": Wording(
        "multifocal pneumonia in both lungs",
        "",
        (
            "Patchy opacities in both lungs are consistent with multifocal pneumonia.",
            "Multifocal pneumonia involves both lungs.",
        ),
        impression="multifocal pneumonia",
        hedges=("Subtle patchy change in both lungs may represent early pneumonia.",),
    ),
    "patchy pneumonia": Wording(
        "pneumonia {where}",
        "",
        (
            "Patchy opacities {where} are consistent with pneumonia.",
            "Patchy airspace disease {where} reflects pneumonia.",
        ),
        hedges=("Subtle patchy change {where} may represent early pneumonia.",),
    ),
    "pneumothorax": Wording(
        "{amount} {side} {apical}pneumothorax",
        "a",
        (
            "A pleural line indicates a {amount} {side} {apical}pneumothorax.",
            "{Amount} {side} {apical}pneumothorax is present.",
        ),
        impression="{amount} {side} pneumothorax",
    ),
    "endotracheal tube": Wording(
        "endotracheal tube",
        "an",
        ("Endotracheal tube tip is above the carina.", "The endotracheal tube ends above the carina."),
    ),
    "central line": Wording(
        "{side} central line",
        "a",
        (
            "{Side} central line ends in the superior vena cava.",
            "{Side} central venous catheter tip is in the superior vena cava.",
        ),
    ),
    "nasogastric tube": Wording(
        "nasogastric tube",
        "a",
        ("Nasogastric tube tip is in the stomach.", "Nasogastric tube courses below the diaphragm."),
    ),
    "chest tube": Wording(
        "{side} chest tube",
        "a",
        ("{Side} chest tube tip is at the lung {end}.", "{Side} chest tube ends at the lung {end}."),
    ),
    "pacemaker": Wording(
        "{side} pacemaker",
        "a",
        (
            "{Side} pacemaker leads end in the right atrium and right ventricle.",
            "{Side} chest wall pacemaker with leads in the right heart.",
        ),
    ),
    "sternal wires": Wording(
        "sternal wires", "", ("Median sternotomy wires are intact.", "Intact sternal wires are noted.")
    ),
}
_PLURALS = {  # bilateral findings: noun and verb change
    "pleural effusion": "pleural effusions",
    "pleural plaque": "pleural plaques",
    "angle": "angles",
    "lung apex": "lung apices",
    "apical pleural cap is": "apical pleural caps are",
    "effusions is": "effusions are",
    "plaques is": "plaques are",
    "A calcified pleural plaques": "Calcified pleural plaques",
    "reflects a ": "reflects ",
    "may represent a small effusion": "may represent small effusions",
}
# (system, rate, labels denied, wordings). A statement is made only where all labels it denies are absent and
# none of them has been denied before.
_LUNG_LABELS = ("Lung Opacity", *OPACITIES)
_ABSENT = (
    ("lungs", 0.75, _LUNG_LABELS,
     ("The lungs are clear.", "Both lungs are clear.", "The lungs are clear without focal opacity.")),
    ("pleura", 0.35, ("Consolidation", "Pleural Effusion", "Pneumothorax"),
     ("No focal consolidation, pleural effusion or pneumothorax.",
      "There is no focal consolidation, pleural effusion, or pneumothorax.")),
    ("pleura", 0.9, ("Pleural Effusion", "Pneumothorax"),
     ("No pleural effusion or pneumothorax.", "There is no pleural effusion or pneumothorax.",
      "No pneumothorax or pleural effusion is seen.")),
    ("pleura", 0.85, ("Pleural Effusion",), ("No pleural effusion.", "There is no pleural effusion.")),
    ("pleura", 0.85, ("Pneumothorax",), ("No pneumothorax.", "No pneumothorax is seen.")),
    ("pleura", 0.12, ("Pleural Other",), ("No pleural thickening.",)),
    ("lungs", 0.6, ("Consolidation",), ("No focal consolidation.", "There is no focal consolidation.")),
    ("lungs", 0.45, ("Edema",), ("No pulmonary edema.", "There is no evidence of pulmonary edema.")),
    ("lungs", 0.25, ("Pneumonia",), ("No evidence of pneumonia.",)),
    ("lungs", 0.2, ("Lung Lesion",), ("No nodule or mass is identified.",)),
    ("lungs", 0.12, ("Atelectasis",), ("No atelectasis.",)),
    ("heart", 0.6, ("Cardiomegaly", "Enlarged Cardiomediastinum"),
     ("Heart size and mediastinal contours are normal.",
      "The cardiomediastinal silhouette is within normal limits.")),
    ("heart", 0.85, ("Cardiomegaly",), ("The heart size is normal.", "The heart is not enlarged.")),
    ("heart", 0.6, ("Enlarged Cardiomediastinum",),
     ("The mediastinal contours are normal.", "The mediastinum is not widened.")),
    ("bones", 0.5, ("Fracture",),
     ("No acute fracture.", "No fracture is identified.", "The bony structures are intact.")),
)  # fmt: skip


def present_sentence(finding: Finding, rng: np.random.Generator, change: str = "") -> str:
    """State a definite finding; `change` ("new", "increased", ...) compares it with the prior study."""
    wording = WORDINGS[finding.kind]
    noun, plural = _noun(finding)
    if change and finding.label != "Support Devices":
        return _capital(f"{noun} {'are' if plural else 'is'} {change} since the prior study.")
    if not wording.sentences or rng.random() < 0.45:
        if finding.label == "Support Devices":
            return _capital(f"{noun} {'are' if plural else 'is'} in place.")
        if plural:
            return f"There are {noun}."
        return f"There is {_with_article(noun, wording.article, plural)}."
    return _fill(str(rng.choice(wording.sentences)), finding)


def hedged_sentence(finding: Finding, rng: np.random.Generator, change: str = "") -> str:
    """State a borderline finding (state -1) so that it stays open; `change` has no place in a hedge."""
    wording = WORDINGS[finding.kind]
    noun, plural = _noun(finding)
    subject = _capital(_with_article(noun, wording.article, plural))
    choices = [f"Possible {noun}.", f"{subject} cannot be excluded.", f"{subject} may be present."]
    choices += [_fill(hedge, finding) for hedge in wording.hedges]
    return str(rng.choice(choices))


def impression_phrase(finding: Finding) -> str:
    """The finding as one short line of the impression, e.g. "Possible mild cardiomegaly."."""
    wording = WORDINGS[finding.kind]
    phrase = _fill(wording.impression, finding) if wording.impression else _noun(finding)[0]
    return f"Possible {phrase}." if finding.state == -1 else _capital(f"{phrase}.")


def absent_sentences(mentioned: set[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Draw normal statements, as (system, sentence), about labels that are not in `mentioned`."""
    taken = set(mentioned)
    drawn = []
    for system, rate, labels, wordings in _ABSENT:
        if not taken.intersection(labels) and rng.random() < rate:
            # "The lungs are clear" leaves its children to be denied by name.
            taken.update(labels[:1] if labels is _LUNG_LABELS else labels)
            drawn.append((system, str(rng.choice(wordings))))
    return drawn


def volume_sentence(inspiration: float, rng: np.random.Generator) -> str:
    """How deep the breath was (0 shallow .. 1 full), where it is worth a word; "" otherwise."""
    if inspiration < 0.3:
        return "Lung volumes are low."
    return "The lungs are well expanded." if inspiration > 0.7 and rng.random() < 0.5 else ""


def _noun(finding: Finding) -> tuple[str, bool]:
    """Return the noun phrase, filled, and whether it is plural (mass nouns never are)."""
    wording = WORDINGS[finding.kind]
    plural = finding.kind == "sternal wires" or (finding.side == "bilateral" and wording.article != "")
    return _fill(wording.noun, finding), plural


def _with_article(noun: str, article: str, plural: bool) -> str:
    return noun if plural or not article else f"{article} {noun}"


def _fill(template: str, finding: Finding) -> str:
    side = finding.side
    grade = _level(finding, ("minimal", "mild", "moderate", "severe"))
    amount = _level(finding, ("tiny", "small", "moderate", "large"))
    centimeters = f"{(finding.size_mm or 10) / 10:.1f}"
    text = template.format(
        side=side,
        Side=_capital(side),
        zone=finding.zone,
        grade=grade,
        Grade=_capital(grade),
        gradely=f"{grade}ly",
        amount=amount,
        Amount=_capital(amount),
        size=f"{centimeters}-cm",
        cm=centimeters,
        lobe=_lobe(finding),
        where=_where(finding),
        wall=f"along the {side} chest wall" if side != "bilateral" else "along both chest walls",
        apical="apical " if finding.zone == "apical" else "",
        end="apex" if finding.zone == "apical" else "base",
    )
    if side == "bilateral":
        text = _pluralize(text)
    return " ".join(text.split())


def _level(finding: Finding, words: tuple[str, str, str, str]) -> str:
    """Grade a severity: definite findings start at 0.4, borderline ones end at 0.25."""
    return words[int(np.searchsorted((0.3, 0.6, 0.8), finding.severity, side="right"))]


def _lobe(finding: Finding) -> str:
    middle = "middle lobe" if finding.side == "right" else "lingula"
    return {"upper": "upper lobe", "mid": middle}.get(finding.zone, "lower lobe")


def _where(finding: Finding) -> str:
    """Where in the lungs, as a prepositional phrase: "at the left lung base", "in both mid lungs"."""
    zone, both = finding.zone, finding.side == "bilateral"
    if zone in ("basal", "apical"):
        part = {"basal": ("base", "bases"), "apical": ("apex", "apices")}[zone][both]
        return f"at both lung {part}" if both else f"at the {finding.side} lung {part}"
    level = f"{zone} " if zone in ("upper", "mid", "lower") else ""
    return f"in both {level}lungs" if both else f"in the {finding.side} {level}lung"


def _pluralize(text: str) -> str:
    for singular, plural in _PLURALS.items():
        text = text.replace(singular, plural)
    return text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
