"""What published VQA questions ask for, in the project's words: kinds, labels, answers.

The tables are to be read: one a data set. What is not in them keeps the set's own name.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np
import pandas as pd

# Resolved by the question: "side" where it asks for one, "zone" where it asks for a place, else the set's own name.
_PLACE = "(place)"
# "normality" where yes, no, normal or abnormal answers it, else "abnormality".
_ABNORMAL = "(abnormal)"
# The same, but a named finding can be asked for too ("Can a nodule be observed ...?"): "presence"; or its side.
_FINDING = "(finding)"

# A question of several types ("SIZE, PRES") is of the one that is listed first.
VQA_RAD_KINDS = {
    "pos": _PLACE,
    "count": "count",
    "plane": "view",
    "abn": _ABNORMAL,
    "pres": "presence",
    "size": "size",
    "attrib": "attribute",
    "color": "color",
    "modality": "modality",
    "organ": "organ",
    "other": "other",
}
SLAKE_KINDS = {"position": _PLACE, "abnormality": _FINDING, "quantity": "count"}  # plane is a section, not a view
MIMIC_CXR_VQA_KINDS = {"presence": "presence", "anatomy": "zone", "abnormality": _ABNORMAL, "plane": "view"}
MEDICAL_DIFF_KINDS = {"location": _PLACE, "level": "severity", "abnormality": _ABNORMAL}

_SIDE = r"\bside\b|\bleft or right\b|\bright or left\b|\bwhich lung\b"
_ZONE = r"\bwhere\b|locat|\blobe|\bzone|\bregion|\barea"

# ---- labels: only terms that name a label itself; a rib fracture is one of several kinds of fracture ----

TERMS = {
    "atelectasis": "Atelectasis",
    "cardiomegaly": "Cardiomegaly",
    "enlarged cardiac silhouette": "Cardiomegaly",
    "enlargement of the cardiac silhouette": "Cardiomegaly",
    "consolidation": "Consolidation",
    "edema": "Edema",
    "mediastinal widening": "Enlarged Cardiomediastinum",
    "fracture": "Fracture",
    "lung lesion": "Lung Lesion",
    "lung opacity": "Lung Opacity",
    "pleural effusion": "Pleural Effusion",
    "pneumonia": "Pneumonia",
    "pneumothorax": "Pneumothorax",
}
# Chest ImaGenome's categories and attributes of devices.
DEVICE_CATEGORIES = {"device", "tubesandlines"}
DEVICES = {
    *("chest port", "chest tube", "endotracheal tube", "enteric tube", "ij line", "intra-aortic balloon pump"),
    *("mediastinal drain", "picc", "pigtail catheter", "subclavian line", "swan-ganz catheter", "tracheostomy tube"),
    *("aortic graft/repair", "cabg grafts", "cardiac pacer and wires", "prosthetic valve", "sternotomy wires"),
}
# The sentences of Medical-Diff-VQA that are about one finding.
ABOUT_ONE = re.compile(
    r"(?:is there (?:evidence of )?|where(?: in the image)? is the |what (?:level|type) is the |is the )"
    rf"({'|'.join(map(re.escape, TERMS))})(?: in .+| located.*| bilateral)?\?"
)

NOTHING = "none"  # the answer to an open question where nothing of the kind is there


def question_kinds(content: pd.Series, table: dict[str, str], question: pd.Series, answer: pd.Series) -> pd.Series:
    """Kinds of questions by their types, `content`: lower case, several with ", " between them."""

    def of(types: str) -> str:
        parts = types.split(", ")
        return next((kind for name, kind in table.items() if name in parts), types or "other")

    rough, closed = content.map({types: of(types) for types in content.unique()}), answer.isin(["yes", "no"])
    place, finding = rough == _PLACE, rough == _FINDING
    abnormal = finding | (rough == _ABNORMAL)
    asked = question.where(place | finding, "").astype(str).str.lower()
    side, zone, normal = (asked.str.contains(words) for words in (_SIDE, _ZONE, "normal|health"))
    chosen = {
        "side": side & (place | finding & ~closed),
        "zone": zone & place,
        "presence": finding & closed & ~normal,
        "normality": abnormal & (closed | answer.isin(["normal", "abnormal"])),
        "abnormality": abnormal,
    }
    kinds = np.select(list(chosen.values()), list(chosen), rough.mask(place, content))
    return pd.Series(kinds, content.index, dtype=object)


@lru_cache(maxsize=100_000)  # templates are filled in with few terms
def label_and_device(terms: tuple[str, ...], categories: tuple[str, ...]) -> tuple[str, bool]:
    """The label that Chest ImaGenome's attributes and categories name, if it is one, and whether they are devices.

    >>> label_and_device(("pneumonia",), ()), label_and_device((), ("device", "tubesandlines"))
    (('Pneumonia', False), ('Support Devices', True))
    """
    terms, categories = (tuple(plain(name).lower() for name in names) for names in (terms, categories))
    device = bool(terms or categories) and DEVICES.issuperset(terms) and DEVICE_CATEGORIES.issuperset(categories)
    if not terms and set(categories) == DEVICE_CATEGORIES:
        return "Support Devices", device
    return (TERMS.get(terms[0], "") if len(terms) == 1 else ""), device


def normalized(value: object) -> str:
    """An answer as it is compared: lower case, single blanks, no full stop at its end; "" for a missing one.

    >>> normalized(" Left  Lung."), normalized(4.0), normalized(None)
    ('left lung', '4', '')
    """
    return plain(value).lower().rstrip(" .")


def plain(value: object) -> str:
    """A value of a JSON or CSV file as text; numbers that pandas has made floats are whole again."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def joined(value: object) -> str:
    """`normalized`; of a list the parts, each once, sorted, with ", " between them.

    >>> joined(["pneumonia", "Edema"]), joined([])
    ('edema, pneumonia', '')
    """
    if not isinstance(value, list):
        return normalized(value)
    try:
        return _joined_parts(tuple(value))
    except TypeError:  # a part that is a list itself
        return _joined_parts(tuple(map(plain, value)))


@lru_cache(maxsize=100_000)  # answers are made of few parts
def _joined_parts(parts: tuple) -> str:
    return ", ".join(sorted({normalized(part) for part in parts} - {""}))


def question_text(value: object) -> str:
    """A question without the note that some copies of VQA-RAD add ("Is the skull fractured? -yes/no")."""
    text = plain(value)
    return _NOTE.sub("", text) if "-" in text[-8:] else text


_NOTE = re.compile(r"\s*-\s*(?:yes/no|open|closed)$", re.IGNORECASE)
