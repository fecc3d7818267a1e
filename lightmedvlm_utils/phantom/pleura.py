"""Diseases of the pleura on the film: fluid, thickening and free air."""

from __future__ import annotations

import numpy as np

from lightmedvlm_utils.phantom.anatomy import SIGN, ZONES, Anatomy
from lightmedvlm_utils.phantom.canvas import Points, ellipse, smooth_curve
from lightmedvlm_utils.phantom.chest import Chest
from lightmedvlm_utils.phantom.records import Finding


def effusion(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """Fluid with a meniscus: a blunted angle up to most of a hemithorax."""
    a, total = chest.anatomy, np.zeros_like(chest.filling)
    for side in finding.sides:
        s = finding.severity if side == finding.sides[0] else finding.severity * rng.uniform(0.55, 1)
        top = a.cp_angle(side) - (14 + 120 * s**1.3 * rng.uniform(0.85, 1.15))
        sag = 16 + 22 * s
        t = np.linspace(0, 1, 9)
        curve = np.stack([SIGN[side] * (4 + t * (a.half_width + 6)), top + sag * (1 - t**3)], axis=1)
        floor = np.array([(SIGN[side] * (a.half_width + 10), 200.0), (SIGN[side] * 4, 200.0)])
        pool = chest.canvas.polygon(np.vstack([smooth_curve(curve), floor]))
        total = np.maximum(total, chest.canvas.blur(pool, 1.8) * (chest.whole_lungs[side] > 0))
    chest.extra += 0.04 * total * np.maximum(*chest.whole_lungs.values())
    return chest.fill(0.98 * total)


def pleural_other(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """Thickening along the wall, calcified plaques over the lung, or an apical cap."""
    canvas, a, s = chest.canvas, chest.anatomy, finding.severity
    total = np.zeros_like(chest.filling)
    for side in finding.sides:
        if finding.kind == "pleural plaque":
            shapes = [_plaque(a, side, finding, rng) for _ in range(int(rng.integers(2, 5)))]
            shape = canvas.polygons(shapes)
        elif finding.kind == "apical cap":
            y = a.apex + 8 + 24 * s
            shape = canvas.polygon(ellipse((SIGN[side] * 0.5 * a.half_width, y - 40), (90, 40 + 4 * s)))
        else:
            shape = canvas.strokes([(_rind(a, side, finding, rng), 12 + 16 * s, 1.0)])
        total = np.maximum(total, shape * (chest.whole_lungs[side] > 0))
    total = canvas.blur(total, 0.9)
    chest.extra += (0.16 if finding.kind == "pleural plaque" else 0.05) * total * (0.4 + 0.6 * s)
    return chest.fill((0.45 + 0.4 * s) * total)


def _plaque(a: Anatomy, side: str, finding: Finding, rng: np.random.Generator) -> Points:
    center = a.place(side, rng.uniform(0.35, 0.95), rng.uniform(*ZONES[finding.zone]) + rng.normal(0, 0.06))
    outline = ellipse(center, (rng.uniform(5, 8), rng.uniform(10, 20)), SIGN[side] * rng.uniform(-70, 10), n=10)
    return smooth_curve(outline + rng.normal(0, 1.3, outline.shape), closed=True)


def _rind(a: Anatomy, side: str, finding: Finding, rng: np.random.Generator) -> Points:
    """Center line of a thickened pleura along the lateral wall down to the costophrenic angle."""
    start = {"mid": 0.25, "lower": 0.5}[finding.zone] + rng.uniform(-0.1, 0.1)
    top = a.apex + start * (a.cp_angle(side) - a.apex)
    ys = np.linspace(top, top + rng.uniform(75, 115), 9)
    return np.array([(a.wall(side, y) + SIGN[side] * (1 + rng.normal(0, 1.2)), y) for y in ys])


def pneumothorax(chest: Chest, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """The lung falls away from apex and wall: a fine pleural line, no vessels and more air beyond it."""
    canvas, a, side = chest.canvas, chest.anatomy, finding.side
    gap = finding.measured_mm if finding.state == 1 else 9.0
    reach = 0.7 if finding.zone == "apical" else 1.6  # how far down the lung it extends
    outline = a.lung(side)
    v = np.clip((outline[:, 1] - a.apex) / (a.dome[side] - a.apex), 0, 1.3)
    u = np.clip((np.abs(outline[:, 0]) - 26) / (a.half_width - 26), 0, 1)
    give = np.clip(1 - v / reach, 0, 1) ** 0.7
    lung = np.stack([outline[:, 0] - SIGN[side] * 0.75 * gap * u * give,
                     outline[:, 1] + gap * give * np.clip(1 - 2.2 * v, 0, 1)], axis=1)  # fmt: skip
    inside = canvas.polygon(lung)
    beyond = np.clip(chest.lungs[side] - inside, 0, 1)
    chest.vessels = chest.vessels * (1 - beyond)
    np.maximum(chest.filling, 0.10 * finding.severity * inside, out=chest.filling)
    chest.filling -= 0.28 * canvas.blur(beyond, 0.7)
    line = canvas.strokes([(np.vstack([lung, lung[:1]]), 2.6, 1.0)]) * chest.lungs[side]
    chest.extra += (0.07 + 0.10 * finding.severity) * canvas.blur(line * canvas.blur(beyond, 3), 0.4) * 2
    return beyond > 0.5
