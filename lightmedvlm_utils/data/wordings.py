"""How questions are worded: a small grammar of frames and noun phrases, a part of whose frames is never trained on.

A wording is a frame with a noun phrase in it, "Does the image show {a}?" with "a pleural effusion". Whole frames are
held out, so that a model which answers them has understood the noun and not learned a sentence by heart.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

KINDS = ("presence", "normality", "side", "zone", "severity", "view", "device", "count")


class Frames(NamedTuple):
    """Sentences with places for a noun phrase: `{a}` with its article, `{it}` without, `{the}` with "the"."""

    known: tuple[str, ...]
    held_out: tuple[str, ...]


_PRESENT = Frames(
    (
        "Is there {a}?", "Does the image show {a}?", "Is {a} present?", "Can you see {a}?", "Is {a} visible?",
        "Are there signs of {a}?", "Does this patient have {a}?", "Is {a} seen on this film?",
        "Does the x-ray show {a}?", "Do you see {a} in this image?", "Is there evidence of {a}?", "Is there any {it}?",
        "Is there {a} on this chest x-ray?", "Does the chest x-ray show signs of {a}?",
    ),
    (
        "Is {a} seen in the image?", "Do you see any signs of {a}?", "Does this film show {a}?",
        "Is there any evidence of {a} in this patient?", "Can {a} be seen?",
    ),
)  # fmt: skip
_ABSENT = Frames(
    (
        "Is there no {it}?", "Does the image show no {it}?", "Is {it} absent?", "Is the image free of {it}?",
        "Is there no evidence of {it}?", "Is the patient without {it}?", "Are there no signs of {it}?",
        "Is it true that there is no {it}?", "Is no {it} seen on this film?", "Is {a} not present?", "Is {a} not seen?",
        "Does the patient have no {it}?",
    ),
    (
        "Is there no sign of {it} on this film?", "Does the x-ray show no {it}?", "Is this chest x-ray free of {it}?",
        "Is no {it} visible?", "Is {a} not visible?",
    ),
)  # fmt: skip
_SIDE = Frames(
    (
        "On which side is {the}?",
        "Which side shows {the}?",
        "Is {the} on the left, on the right or on both sides?",
        "Which side of the chest has {the}?",
        "Where is {the}, left or right?",
        "What is the side of {the}?",
    ),
    ("On which side do you see {the}?", "Which side is affected by {the}?", "Is {the} left, right or on both sides?"),
)
_ON_SIDE = Frames(
    (
        "Is {the} on the {side}?", "Is {the} on the {side} side?", "Does {the} lie on the {side}?",
        "Is {the} seen on the {side} side?", "Is it the {side} side that shows {the}?",
    ),
    ("Do you see {the} on the {side} side?", "Is {the} present on the {side}?"),
)  # fmt: skip
_ZONE = Frames(
    (
        "In which part of the lung is {the}?", "Which lung zone shows {the}?", "How high in the lung is {the}?",
        "Which zone has {the}?", "Where in the lung is {the}: upper, middle or lower?",
    ),
    ("In which zone of the lung do you see {the}?", "Which part of the lung has {the}?"),
)  # fmt: skip
_SEVERITY = Frames(
    ("How severe is {the}?", "What is the severity of {the}?", "What is the grade of {the}?", "Which grade has {the}?"),
    ("How severe is {the} in this patient?", "Which severity has {the}?"),
)
_SIZE = Frames(
    ("How large is {the}?", "What is the size of {the}?", "What is the amount of {the}?", "Which size has {the}?"),
    ("How large is {the} in this patient?", "What size has {the}?"),
)
_COUNT = Frames(
    (
        "How many {many} are there?", "How many {many} does the image show?", "What is the number of {many}?",
        "How many {many} can you see?", "How many {many} are seen on this film?",
    ),
    ("How many {many} do you see?", "How many {many} does this patient have?"),
)  # fmt: skip
_NORMAL = Frames(
    (
        "Is the chest x-ray normal?", "Is this a normal study?", "Is the image free of any abnormal finding?",
        "Does the image look normal?", "Is this a normal chest?", "Is this film normal?", "Is nothing abnormal seen?",
        "Is the image without any abnormality?",
    ),
    ("Is this a normal chest x-ray?", "Is the study free of any abnormality?", "Does this chest x-ray look normal?"),
)  # fmt: skip
_ABNORMAL = Frames(
    (
        "Is there any abnormality?", "Is this study abnormal?", "Does the image show an abnormal finding?",
        "Is the chest x-ray abnormal?", "Is there anything abnormal?", "Does the film show any abnormality?",
    ),
    ("Is this an abnormal film?", "Do you see any abnormality?", "Does the chest x-ray show anything abnormal?"),
)  # fmt: skip
_VIEW = Frames(
    ("Which view is this?", "What is the projection of this film?", "Is this a PA or an AP film?",
     "Which projection was used?", "What kind of view is it?"),
    ("Which projection is this?", "What view of the chest is this?"),
)  # fmt: skip
_IS_VIEW = Frames(
    ("Is this {view} film?", "Is this {view} view?", "Was this film taken as {view} view?",
     "Is the projection {view} one?"),
    ("Is this chest x-ray {view} view?", "Is it {view} film?"),
)  # fmt: skip
_DEVICES = Frames(
    ("Which devices are in place?", "Which tubes, lines or devices does the image show?", "What devices can you see?",
     "Which medical devices does this patient have?", "Which support devices are there?"),
    ("Which devices do you see?", "What tubes, lines or devices are in place?"),
)  # fmt: skip

# What each label is called; the first is the plainest. With its article, where it takes one.
NOUNS: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("atelectasis", "a collapse of lung tissue", "a collapsed part of the lung"),
    "Cardiomegaly": ("cardiomegaly", "an enlarged heart", "an enlarged cardiac silhouette", "enlargement of the heart"),
    "Consolidation": ("consolidation", "a lung consolidation", "a consolidated part of the lung"),
    "Edema": ("pulmonary edema", "edema", "edema of the lungs", "pulmonary vascular congestion"),
    "Enlarged Cardiomediastinum": (
        "a widened mediastinum", "widening of the mediastinum", "an enlarged cardiomediastinum",
        "an enlarged cardiomediastinal silhouette",
    ),
    "Fracture": ("a fracture", "a broken bone", "a fractured bone"),
    "Lung Lesion": ("a lung lesion", "a pulmonary nodule or mass", "a nodule or mass in the lungs"),
    "Lung Opacity": ("a lung opacity", "an opacity in the lungs", "an opacified part of the lung"),
    "Pleural Effusion": ("a pleural effusion", "fluid in the pleural space", "pleural fluid"),
    "Pleural Other": (
        "pleural thickening", "thickening, scarring or calcification of the pleura",
        "a pleural abnormality other than effusion",
    ),
    "Pneumonia": ("pneumonia", "an infection of the lungs", "a lung infection"),
    "Pneumothorax": ("a pneumothorax", "air in the pleural space", "pleural air"),
    "Support Devices": ("a support device", "a tube, line or other medical device", "a medical device"),
}  # fmt: skip
DEVICES: dict[str, tuple[str, ...]] = {
    "endotracheal tube": ("an endotracheal tube", "a tube in the trachea"),
    "central line": ("a central line", "a central venous catheter"),
    "nasogastric tube": ("a nasogastric tube", "a tube into the stomach"),
    "chest tube": ("a chest tube", "a pleural drain"),
    "pacemaker": ("a pacemaker", "a pacemaker with its leads"),
    "sternal wires": ("a sternal wire", "a sternotomy wire"),
}
_PLURAL = {
    "Lung Lesion": ("lung lesions", "nodules or masses"),
    "Fracture": ("fractures", "broken bones"),
    "Support Devices": ("devices", "tubes, lines or other devices"),
}
# Sentences that no frame makes.
_OWN = {
    ("Atelectasis", False): ("Is any part of the lung collapsed?",),
    ("Cardiomegaly", False): ("Is the heart enlarged?", "Is the heart too large?"),
    ("Cardiomegaly", True): ("Is the heart of normal size?", "Is the heart size normal?", "Is the heart not enlarged?"),
    ("Consolidation", False): ("Is any part of the lung consolidated?",),
    ("Enlarged Cardiomediastinum", False): ("Is the mediastinum widened?",),
    ("Enlarged Cardiomediastinum", True): ("Is the mediastinum of normal width?", "Is the mediastinum not widened?"),
    ("Fracture", False): ("Is any bone broken?", "Is any bone fractured?"),
    ("Fracture", True): ("Are all bones intact?",),
    ("Lung Opacity", False): ("Is any part of the lungs opacified?",),
    ("Pleural Other", False): ("Is the pleura thickened?",),
    ("Support Devices", False): ("Are any tubes, lines or devices in place?",),
}
_SIZED = ("Pleural Effusion", "Pneumothorax")  # their amount is asked, the others' severity
_FRAMES = {
    ("presence", False): _PRESENT,
    ("presence", True): _ABSENT,
    ("normality", False): _NORMAL,
    ("normality", True): _ABNORMAL,
    ("device", False): _PRESENT,
    ("device", True): _ABSENT,
}


@cache
def wordings(kind: str, subject: str = "", value: str = "", negated: bool = False) -> Frames:
    """All wordings of one question, those that may be trained on and those held out.

    `subject` is a label or a device, "" for questions about the whole image; a `value` makes a closed question of an
    open one ("Is the effusion on the left?"); `negated` asks for the absence. KeyError for what nobody asks.
    """
    phrases = _PLURAL[subject] if kind == "count" else NOUNS.get(subject) or DEVICES.get(subject) or ("",)
    frames = _frames(kind, subject, value, negated)
    known, held_out = (tuple(dict.fromkeys(_fill(part, phrases, value))) for part in frames)
    if kind == "presence":
        own = _OWN.get((subject, negated), ())
        known = (known[0], *own, *known[1:])
    return Frames(known, held_out)


def _frames(kind: str, subject: str, value: str, negated: bool) -> Frames:
    if kind == "side":
        return _ON_SIDE if value else _SIDE
    if kind == "view":
        return _IS_VIEW if value else _VIEW
    if kind == "severity":
        return _SIZE if subject in _SIZED else _SEVERITY
    if kind == "device" and not subject:
        return _DEVICES
    return {"zone": _ZONE, "count": _COUNT}[kind] if kind in ("zone", "count") else _FRAMES[kind, negated]


def _fill(frames: tuple[str, ...], phrases: tuple[str, ...], value: str) -> list[str]:
    view = f"{'an' if value == 'AP' else 'a'} {value}"
    filled = []
    for frame in frames:
        for noun in phrases:
            it = re.sub(r"^an? ", "", noun)
            text = frame.format(a=noun, it=it, the=f"the {it}", many=noun, side=value, view=view)
            filled.append(text[0].upper() + text[1:])
    return filled
