"""Diseases of lung and heart, and the list of all: each one changes the chest's maps and returns where it shows.

Airspace disease replaces air by water (`Chest.filling`), so that vessels and neighboring borders vanish in it
by themselves (silhouette sign); calcium, fluid outside the lung and metal add attenuation (`Chest.extra`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightmedvlm_utils.phantom.anatomy import SIGN, ZONES, Anatomy
from lightmedvlm_utils.phantom.canvas import ellipse, smooth_curve
from lightmedvlm_utils.phantom.chest import Chest
from lightmedvlm_utils.phantom.pleura import effusion, pleural_other, pneumothorax
from lightmedvlm_utils.phantom.records import Finding


def atelectasis(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """Plates, a crowded base, or a collapsed lobe as a dense wedge."""
    total = np.zeros_like(chest.filling)
    for side in finding.sides:
        if finding.kind == "linear atelectasis":
            shape = _plates(chest, side, finding, rng)
        elif finding.kind == "basal atelectasis":
            shape = _basal_band(chest, side, finding, rng)
        else:
            shape = _collapsed_lobe(chest, side, finding)
        total = np.maximum(total, shape)
    return chest.fill(total * (0.35 + 0.6 * finding.severity))


def _plates(chest: Chest, side: str, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    plates = []
    for _ in range(int(rng.integers(2, 5))):
        center = chest.anatomy.place(side, rng.uniform(0.3, 0.75), rng.uniform(*ZONES[finding.zone]) - 0.04)
        radii = (rng.uniform(20, 40), rng.uniform(2.6, 4.2))
        plates.append(ellipse(center, radii, rng.normal(0, 9)))
    return chest.canvas.blur(chest.canvas.polygons(plates), 0.7)


def _basal_band(chest: Chest, side: str, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    a, s = chest.anatomy, SIGN[side]
    height = (16 + 30 * finding.severity) * rng.uniform(0.8, 1.2)
    xs = np.linspace(10, a.half_width + 8, 7)
    top = a.dome[side] - height * (0.55 + 0.45 * rng.random(7)) + 10 * (xs / a.half_width) ** 3
    upper = smooth_curve(np.stack([s * xs, top], axis=1))
    floor = np.array([(s * (a.half_width + 8), a.dome[side] + 70), (s * 10, a.dome[side] + 70)])
    band = chest.canvas.blur(chest.canvas.polygon(np.vstack([upper, floor])), 2.5)
    return band * np.clip(0.85 + 0.3 * chest.canvas.texture(rng, 9), 0.3, 1)


def _collapsed_lobe(chest: Chest, side: str, finding: Finding) -> np.ndarray:
    a = chest.anatomy
    if finding.zone == "upper":
        corners = [a.place(side, *uv) for uv in ((-0.3, 0.5), (-0.4, -0.05), (0.95, 0.0), (0.75, 0.22), (0.25, 0.36))]
    else:
        corners = [a.place(side, *uv) for uv in ((-0.5, 0.5), (0.02, 0.5), (0.33, 0.8), (0.62, 1.12), (-0.6, 1.2))]
    return chest.canvas.blur(chest.canvas.polygon(np.array(corners)), 1.5)


def cardiomegaly(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """The geometry is already large (see `Anatomy`); this only marks the heart."""
    return chest.heart > 0.5


def wide_mediastinum(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """Mark the upper mediastinum, which `Anatomy` has widened."""
    return (chest.mediastinum > 0.5) & (chest.heart < 0.5)


def consolidation(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """A lobe or segment filled homogeneously up to its fissure, with air bronchograms."""
    a, side = chest.anatomy, finding.side
    low, high = {"upper": (-0.1, 0.46), "mid": (0.46, 0.86), "lower": (0.60, 1.4)}[finding.zone]
    extent = 0.5 + 0.5 * finding.severity
    inner = -0.5 if rng.random() < 0.4 else rng.uniform(-0.1, 0.45 * (1.3 - extent))
    outer = 1.2 if rng.random() < 0.6 else rng.uniform(0.65, 0.9)
    tilt = rng.uniform(-0.05, 0.08)
    if finding.zone == "upper":  # the minor fissure below is sharp, the top may be spared
        low = high - (high - low) * extent * rng.uniform(0.8, 1.1)
    elif finding.zone == "lower":
        low = 1.0 - 0.42 * extent * rng.uniform(0.85, 1.1)
    uvs = [(inner, low + tilt), ((inner + outer) / 2, low), (outer, low - tilt), (outer, high),
           ((inner + outer) / 2, high + tilt / 2), (inner, high)]  # fmt: skip
    canvas = chest.canvas
    lobe = canvas.polygon(np.array([a.place(side, u, v) for u, v in uvs]))
    # Soft and uneven where lung borders lung, sharp at the fissure (seen end on below the upper lobe).
    soft = np.clip(2.6 * (canvas.blur(lobe, 7) + 0.12 * canvas.texture(rng, 26) - 0.26), 0, 1)
    if finding.zone != "lower":
        low, high = (-0.4, high) if finding.zone == "upper" else (low, 1.6)
        side_of_fissure = [(-0.6, low), (1.4, low - tilt), (1.4, high), (-0.6, high + tilt)]
        soft *= canvas.polygon(np.array([a.place(side, u, v) for u, v in side_of_fissure]))
    dense = soft * (0.6 + 0.35 * finding.severity)
    mask = chest.fill(dense, only=side)
    bronchi = _bronchograms(a, side, (low + high) / 2, rng)
    chest.filling -= 0.45 * dense * canvas.blur(canvas.strokes(bronchi), 0.7)
    return mask


def _bronchograms(a: Anatomy, side: str, v: float, rng: np.random.Generator):
    root = a.place(side, -0.05, 0.45)
    for _ in range(5):
        tip = a.place(side, rng.uniform(0.45, 0.85), np.clip(v + rng.normal(0, 0.12), 0.05, 1.0))
        middle = (root + tip) / 2 + rng.normal(0, 4, 2)
        yield smooth_curve([root, middle, tip]), 3.6, 1.0


def edema(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """Perihilar haze or bat wings, blurred vessels, septal lines at the bases."""
    canvas, a, s = chest.canvas, chest.anatomy, finding.severity
    alveolar = finding.kind == "alveolar edema"
    wings = np.zeros_like(chest.filling)
    for side in SIGN:
        center = a.place(side, rng.uniform(0.2, 0.36), rng.uniform(0.46, 0.62))
        radii = (rng.uniform(24, 34), rng.uniform(38, 52))
        wings = np.maximum(wings, canvas.blob(center, radii, SIGN[side] * rng.uniform(-15, 15)))
    fluffy = np.clip(0.75 + (0.45 if alveolar else 0.2) * canvas.texture(rng, 13), 0, 1.3)
    chest.vessels = (1 - 0.7 * s) * chest.vessels + 1.3 * s * canvas.blur(chest.vessels, 3.5)
    if not alveolar:
        lines = canvas.blur(canvas.strokes(_septa(a, rng, s)), 0.6)
        chest.fill(0.55 * lines * (0.5 + 0.5 * s))
        return chest.fill((0.12 + 0.40 * s) * (0.35 + 0.65 * wings) * fluffy)
    return chest.fill((0.25 + 0.6 * s) * wings**0.8 * fluffy)


def _septa(a: Anatomy, rng: np.random.Generator, severity: float):
    """Kerley B lines: short, horizontal, at the wall; and a coarse net of longer A lines."""
    for side, s in SIGN.items():
        for v in np.arange(0.55, 1.0, 0.055 - 0.02 * severity):
            outer = a.place(side, 0.99, v)
            yield np.array([outer, outer - np.array([s * rng.uniform(12, 22), rng.normal(0, 1.5)])]), 2.4, 1.0
        for _ in range(int(6 + 10 * severity)):
            point, angle = a.place(side, rng.uniform(0.1, 0.8), rng.uniform(0.25, 0.9)), rng.uniform(0, np.pi)
            yield np.array([point, point + 24 * np.array([np.cos(angle), np.sin(angle)])]), 2.0, 0.7


def lesion(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """A round nodule or mass of the stated diameter."""
    canvas, radius = chest.canvas, finding.measured_mm / 2
    center = chest.anatomy.place(finding.side, rng.uniform(0.3, 0.8), rng.uniform(*ZONES[finding.zone]))
    t = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    lobes = radius * (1 + 0.05 * rng.standard_normal(12))
    outline = smooth_curve(center + np.stack([lobes * np.cos(t), lobes * np.sin(t)], axis=1), closed=True)
    disc = canvas.blur(canvas.polygon(outline), 0.9)
    inside = disc * chest.whole_lungs[finding.side]
    dense = inside * (0.55 + 0.45 * canvas.blur(disc, 0.35 * radius)) * (0.5 + 0.5 * finding.severity)
    np.maximum(chest.filling, dense, out=chest.filling)
    chest.extra += 0.10 * dense
    return inside > 0.5


def opacity(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """A hazy, ill-defined veil."""
    canvas = chest.canvas
    center = chest.anatomy.place(finding.side, rng.uniform(0.3, 0.7), rng.uniform(*ZONES[finding.zone]))
    radii = rng.uniform(24, 40, 2)
    veil = canvas.blob(center, radii, rng.uniform(-40, 40)) * np.clip(1 + 0.22 * canvas.texture(rng, 40), 0.4, 1.4)
    return chest.fill((0.30 + 0.45 * finding.severity) * np.clip(veil, 0, 1), only=finding.side)


def pneumonia(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """Clusters of patchy airspace shadows, in one zone or in several."""
    canvas, s = chest.canvas, finding.severity
    zones = [finding.zone] if finding.zone in ZONES else list(rng.permutation(["upper", "mid", "lower"]))
    total = np.zeros_like(chest.filling)
    for side in finding.sides:
        for zone in zones[: 2 if finding.kind == "multifocal pneumonia" else 1]:
            core = chest.anatomy.place(side, rng.uniform(0.3, 0.7), rng.uniform(*ZONES[zone]))
            for _ in range(int(5 + 6 * s)):
                spot = core + rng.normal(0, 14, 2)
                outline = ellipse(spot, rng.uniform(5, 11, 2), rng.uniform(0, 180), n=12)
                outline += rng.normal(0, 1.8, outline.shape)
                total = np.maximum(total, rng.uniform(0.7, 1.0) * canvas.polygon(outline))
    patchy = canvas.blur(total, 1.8) * np.clip(1 + 0.2 * canvas.texture(rng, 7), 0, 1.2)
    return chest.fill((0.3 + 0.6 * s) * patchy)


DRAW = {
    "Atelectasis": atelectasis,
    "Cardiomegaly": cardiomegaly,
    "Consolidation": consolidation,
    "Edema": edema,
    "Enlarged Cardiomediastinum": wide_mediastinum,
    "Lung Lesion": lesion,
    "Lung Opacity": opacity,
    "Pleural Effusion": effusion,
    "Pleural Other": pleural_other,
    "Pneumonia": pneumonia,
    "Pneumothorax": pneumothorax,
}
# What a lateral film shows; the rest is hidden by the other lung or by the shoulders.
LATERAL_FINDINGS = frozenset(DRAW) - {"Pneumothorax", "Enlarged Cardiomediastinum"}
# Free air comes first, so that disease may still be drawn within the shrunken lung.
_ORDER = ("Pneumothorax", "Edema")


def draw_findings(chest: Chest, findings: Sequence[Finding]) -> list[tuple[Finding, np.ndarray]]:
    """Draw the diseases (not fractures and devices) and say where each shows."""
    ordered = sorted((f for f in findings if f.label in DRAW), key=lambda f: f.label not in _ORDER)
    return [(f, DRAW[f.label](chest, f, np.random.default_rng(f.seed))) for f in ordered]
