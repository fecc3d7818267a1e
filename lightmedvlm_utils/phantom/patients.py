"""The patient model behind the phantom data set: who is imaged, when, and with which findings.

Everything a study shows and says follows from the records drawn here; `images.render` draws them and
`reports.write_report` puts them in words. Sampling is deterministic in the seed and prefix-stable: patient
`i` is the same whether 10 or 10,000 patients are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lightmedvlm_utils.observations import FINDINGS
from lightmedvlm_utils.phantom.records import Finding, Patient, Study, TrueState, View, true_states

__all__ = [
    "Finding",
    "Patient",
    "Study",
    "TrueState",
    "View",
    "sample_patients",
    "true_states",
    "with_finding",
    "without_finding",
]

# Consecutive indices are scattered over MIMIC's eight-digit ranges by multiplying with a number coprime to
# ten million: unique without a table of used ids, and not sorted by time of sampling.
_ID_RANGE, _ID_STEP = 10_000_000, 6_700_417
_FIRST_SUBJECT, _FIRST_STUDY = 10_000_032, 50_414_267
_MAX_STUDIES = 4

_HEALTHY = 0.19  # patients drawn without any disease; some of the others have none either
_BORDERLINE = 0.09  # share of findings that are equivocal (state -1)


class _Kind(NamedTuple):
    name: str
    weight: float
    sides: tuple[str, ...]
    zones: tuple[str, ...]
    size_mm: tuple[float, float] | None = None


class _Disease(NamedTuple):
    prevalence: float  # among patients who are not healthy
    persistence: float  # chance that a later study still shows it
    kinds: tuple[_Kind, ...]


_EITHER, _ANY = ("left", "right"), ("left", "right", "bilateral")
_DISEASES: dict[str, _Disease] = {
    "Atelectasis": _Disease(0.22, 0.6, (
        _Kind("linear atelectasis", 3, _ANY, ("basal", "mid")),
        _Kind("basal atelectasis", 3, _ANY, ("basal",)),
        _Kind("lobar collapse", 2, _EITHER, ("upper", "lower")))),
    "Cardiomegaly": _Disease(0.26, 0.95, (_Kind("cardiomegaly", 1, ("",), ("",)),)),
    "Consolidation": _Disease(0.15, 0.6, (
        _Kind("lobar consolidation", 1, _EITHER, ("upper", "mid", "lower")),)),
    "Edema": _Disease(0.17, 0.5, (
        _Kind("interstitial edema", 1, ("bilateral",), ("diffuse",)),
        _Kind("alveolar edema", 1, ("bilateral",), ("diffuse",)))),
    "Enlarged Cardiomediastinum": _Disease(0.14, 0.9, (_Kind("widened mediastinum", 1, ("",), ("upper",)),)),
    "Fracture": _Disease(0.14, 0.9, (
        _Kind("rib fracture", 3, _EITHER, ("upper", "mid", "lower")),
        _Kind("clavicle fracture", 2, _EITHER, ("apical",)))),
    "Lung Lesion": _Disease(0.15, 0.95, (
        _Kind("nodule", 1, _EITHER, ("upper", "mid", "lower"), (14, 29)),
        _Kind("mass", 1, _EITHER, ("upper", "mid", "lower"), (31, 60)))),
    "Lung Opacity": _Disease(0.13, 0.5, (_Kind("hazy opacity", 1, _EITHER, ("upper", "mid", "lower")),)),
    "Pleural Effusion": _Disease(0.30, 0.65, (_Kind("pleural effusion", 1, _ANY, ("basal",)),)),
    "Pleural Other": _Disease(0.14, 0.95, (
        _Kind("pleural thickening", 2, _EITHER, ("mid", "lower")),
        _Kind("pleural plaque", 2, _ANY, ("mid", "lower")),
        _Kind("apical cap", 1, _ANY, ("apical",)))),
    "Pneumonia": _Disease(0.15, 0.45, (
        _Kind("multifocal pneumonia", 2, ("bilateral",), ("diffuse",)),
        _Kind("patchy pneumonia", 2, _EITHER, ("upper", "mid", "lower")))),
    "Pneumothorax": _Disease(0.14, 0.45, (
        _Kind("pneumothorax", 1, _EITHER, ("apical", "diffuse"), (15, 60)),)),
    "Support Devices": _Disease(0.28, 0.6, (
        _Kind("endotracheal tube", 3, ("",), ("",)),
        _Kind("central line", 4, ("right", "right", "left"), ("upper",)),
        _Kind("nasogastric tube", 3, ("",), ("",)),
        _Kind("chest tube", 2, _EITHER, ("basal", "apical")),
        _Kind("pacemaker", 3, ("left", "left", "right"), ("upper",)),
        _Kind("sternal wires", 2, ("",), ("",)))),
}  # fmt: skip


def sample_patients(n: int, seed: int) -> list[Patient]:
    """Draw `n` patients with their studies, findings and views; the first `m` do not depend on `n`."""
    return [_sample_patient(i, seed) for i in range(n)]


def without_finding(study: Study, label: str) -> Study:
    """The same study had it never had any finding of `label`: rendered with the same view it differs in that alone."""
    return replace(study, findings=tuple(finding for finding in study.findings if finding.label != label))


def with_finding(study: Study, label: str, seed: int) -> Study:
    """The same study with a definite finding of `label` beside its others, instead of what it had of that label."""
    rng = np.random.default_rng(seed)
    disease = _DISEASES[label]
    weights = np.array([kind.weight for kind in disease.kinds])
    kind = disease.kinds[rng.choice(len(weights), p=weights / weights.sum())]
    added = _sample_finding(rng, label, kind, borderline=False)
    return replace(study, findings=_in_order([*without_finding(study, label).findings, added]))


def _in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    order = {label: position for position, label in enumerate(FINDINGS)}
    return tuple(sorted(findings, key=lambda finding: order[finding.label]))


def _sample_patient(i: int, seed: int) -> Patient:
    rng = np.random.default_rng(np.random.SeedSequence((seed, i)))
    patient = Patient(
        subject_id=_FIRST_SUBJECT - 32 + (i * _ID_STEP + 32) % _ID_RANGE,
        sex=str(rng.choice(["F", "M"])),
        age=int(np.clip(rng.normal(61, 17), 18, 91)),
        habitus=float(np.clip(rng.normal(0.05, 0.5), -1, 1)),
        anatomy_seed=int(rng.integers(2**31)),
    )
    healthy = rng.random() < _HEALTHY
    count = int(rng.choice([1, 2, 3, 4], p=[0.55, 0.26, 0.12, 0.07]))
    studies: list[Study] = []
    day = 0
    for k in range(count):
        previous = studies[-1].findings if studies else ()
        findings = () if healthy else _evolve(rng, previous) if k else _sample_findings(rng)
        studies.append(_sample_study(rng, patient, i, k, day, findings))
        day += int(np.ceil(rng.exponential(60)))
    return replace(patient, studies=tuple(studies))


def _sample_study(rng, patient: Patient, i: int, k: int, day: int, findings: Sequence[Finding]) -> Study:
    intubated = any(f.kind == "endotracheal tube" for f in findings)
    portable = bool(rng.random() < (0.75 if intubated else 0.38))
    positions = ("AP",) if portable else ("PA", "LATERAL") if rng.random() < 0.62 else ("PA",)
    number = i * _MAX_STUDIES + k
    return Study(
        subject_id=patient.subject_id,
        study_id=50_000_000 + (number * _ID_STEP + _FIRST_STUDY - 50_000_000) % _ID_RANGE,
        index=k,
        day=day,
        age=patient.age + day // 365,
        sex=patient.sex,
        habitus=float(np.clip(patient.habitus + rng.normal(0, 0.05), -1, 1)),
        inspiration=float(np.clip(rng.normal(0.5 if portable else 0.65, 0.24), 0, 1)),
        portable=portable,
        anatomy_seed=patient.anatomy_seed,
        findings=tuple(findings),
        views=tuple(_sample_view(rng, position) for position in positions),
    )


def _sample_view(rng, position: str) -> View:
    dicom_id = "-".join(f"{int(word):08x}" for word in rng.integers(2**32, size=5))
    spread = 1.4 if position == "AP" else 1.0  # bedside films are positioned less carefully
    collimated = rng.random(4) < 0.35
    return View(
        dicom_id=dicom_id,
        position=position,
        rotation=float(np.clip(rng.normal(0, 2.5 * spread), -9, 9)),
        turn=float(np.clip(rng.normal(0, 0.35 * spread), -1, 1)),
        magnification=float(np.clip(rng.normal(1.0, 0.07), 0.84, 1.18)),
        shift=(
            float(np.clip(rng.normal(0, 0.03 * spread), -0.09, 0.09)),
            float(np.clip(rng.normal(0, 0.03 * spread), -0.09, 0.09)),
        ),
        exposure=float(np.clip(rng.normal(0, 0.45), -1, 1)),
        contrast=float(np.clip(rng.normal(1.0, 0.14), 0.7, 1.35)),
        collimation=_four(rng.uniform(0.01, 0.06, 4) * collimated),
        noise=float(rng.uniform(0.006, 0.022)),
        seed=int(rng.integers(2**31)),
    )


def _four(values: np.ndarray) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(value) for value in values)
    return left, top, right, bottom


def _sample_findings(rng, scale: float = 1.0) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    for label, disease in _DISEASES.items():
        if rng.random() < scale * disease.prevalence * _association(label, findings):
            findings += _sample_label(rng, label, disease)
    return tuple(findings)


def _association(label: str, findings: Sequence[Finding]) -> float:
    """How much likelier `label` is given the findings so far (heart failure comes as a triad)."""
    present = {f.label for f in findings if f.state == 1}
    if label == "Edema" and "Cardiomegaly" in present:
        return 1.5
    if label == "Pleural Effusion" and "Edema" in present:
        return 1.4
    if label == "Enlarged Cardiomediastinum" and "Cardiomegaly" in present:
        return 0.8
    return 1.0


def _sample_label(rng, label: str, disease: _Disease) -> list[Finding]:
    """One or, for lesions, fractures and devices, several findings of a label, all of one state."""
    borderline = label != "Support Devices" and rng.random() < _BORDERLINE
    repeats = 1
    if label == "Support Devices":
        repeats = int(rng.choice([1, 2, 3], p=[0.5, 0.32, 0.18]))
    elif label in ("Lung Lesion", "Fracture") and not borderline:
        repeats = int(rng.choice([1, 2, 3], p=[0.65, 0.23, 0.12]))
    weights = np.array([kind.weight for kind in disease.kinds], float)
    distinct = label == "Support Devices"
    picks = rng.choice(len(weights), repeats, replace=not distinct, p=weights / weights.sum())
    return [_sample_finding(rng, label, disease.kinds[pick], borderline) for pick in picks]


def _sample_finding(rng, label: str, kind: _Kind, borderline: bool) -> Finding:
    severity = rng.uniform(0.08, 0.25) if borderline else 0.4 + 0.6 * rng.beta(1.6, 1.4)
    size = None
    if kind.size_mm is not None:
        low, high = kind.size_mm
        size = float(round(low if borderline else low + (high - low) * severity))
    return Finding(
        label=label,
        kind=kind.name,
        side=str(rng.choice(kind.sides)),
        zone=str(rng.choice(kind.zones)),
        severity=round(float(severity), 3),
        state=-1 if borderline else 1,
        seed=int(rng.integers(2**31)),
        size_mm=size,
    )


def _evolve(rng, previous: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings of the next study: some resolve, some change, some are new."""
    kept = []
    for finding in previous:
        if rng.random() < _DISEASES[finding.label].persistence:
            kept.append(_progress(rng, finding))
    have = {finding.label for finding in kept}
    new = [finding for finding in _sample_findings(rng, scale=0.4) if finding.label not in have]
    return _in_order([*kept, *new])


def _progress(rng, finding: Finding) -> Finding:
    """Change the severity; a definite finding stays visible and a borderline one stays faint."""
    fixed = finding.label in ("Support Devices", "Fracture", "Pleural Other")
    if fixed or finding.state == -1:
        return finding
    severity = float(np.clip(finding.severity + rng.normal(0, 0.18), 0.4, 1.0))
    change = 0.5 * (severity - finding.severity)
    size = None if finding.size_mm is None else float(round(finding.size_mm * (1 + change)))
    return replace(finding, severity=round(severity, 3), size_mm=size)
