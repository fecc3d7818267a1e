"""What the phantom knows about a patient: the records that images and reports are made from, and the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lightmedvlm_utils.observations import FINDINGS, LABELS, OPACITIES


@dataclass(frozen=True)
class Finding:
    """One abnormality or device. `side` is the patient's side; `seed` fixes its exact place and shape."""

    label: str  # one of observations.FINDINGS
    kind: str  # what it is in words, e.g. "mass", "pacemaker", "rib fracture"
    side: str  # "left" | "right" | "bilateral" | ""
    zone: str  # "upper" | "mid" | "lower" | "apical" | "basal" | "diffuse" | ""
    severity: float  # 0 (barely there) .. 1 (severe)
    state: int  # 1 definite, -1 borderline (hedged in the report)
    seed: int
    size_mm: float | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides it occupies: one, or both when it is bilateral or has no side."""
        return (self.side,) if self.side in ("left", "right") else ("left", "right")

    @property
    def measured_mm(self) -> float:
        """`size_mm` of a kind that cannot be drawn without; ValueError where there is none."""
        if self.size_mm is None:
            raise ValueError(f"A {self.kind} needs a size.")
        return self.size_mm


@dataclass(frozen=True)
class View:
    """One exposure of a study: projection, positioning and film."""

    dicom_id: str
    position: str  # "PA" | "AP" | "LATERAL"
    rotation: float  # in-plane tilt, degrees
    turn: float  # patient turned about the long axis, -1 .. 1
    magnification: float  # 1 = the thorax fills the film as usual
    shift: tuple[float, float]  # off-center positioning (x, y), fraction of the film
    exposure: float  # -1 (white, under-exposed) .. 1 (dark, over-exposed)
    contrast: float  # gain of the film curve, about 1
    collimation: tuple[float, float, float, float]  # left, top, right, bottom, fraction of the film
    noise: float  # standard deviation in gray levels of 0 .. 1
    seed: int


@dataclass(frozen=True)
class Study:
    """One visit: the patient as on that day, the findings, and the views taken."""

    subject_id: int
    study_id: int
    index: int  # 0 for the patient's first study
    day: int  # days since the first study
    age: int
    sex: str  # "F" | "M"
    habitus: float  # -1 thin .. 1 obese
    inspiration: float  # 0 shallow .. 1 full
    portable: bool
    anatomy_seed: int  # the same in all studies of a patient
    findings: tuple[Finding, ...] = ()
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class Patient:
    """A person with one to four studies, oldest first."""

    subject_id: int
    sex: str
    age: int
    habitus: float
    anatomy_seed: int
    studies: tuple[Study, ...] = ()


class TrueState(NamedTuple):
    """Ground truth of one label: severity 0..1 and state 1 (present), -1 (borderline), 0 (absent)."""

    severity: float
    state: int


def true_states(study: Study) -> dict[str, TrueState]:
    """Ground truth for all 14 labels, with CheXpert's hierarchy.

    Lung Opacity is present when one of its children is definite; No Finding when nothing but devices is.
    """
    states = {label: TrueState(0.0, 0) for label in LABELS}
    for finding in study.findings:
        states[finding.label] = _stronger(states[finding.label], TrueState(finding.severity, finding.state))
    for label in OPACITIES:
        if states[label].state == 1:
            states["Lung Opacity"] = _stronger(states["Lung Opacity"], states[label])
    diseased = any(states[label].state for label in FINDINGS if label != "Support Devices")
    states["No Finding"] = TrueState(0.0, 0 if diseased else 1)
    return states


def _stronger(a: TrueState, b: TrueState) -> TrueState:
    return max(a, b, key=lambda s: (s.state == 1, s.severity, s.state != 0))
