"""Tubes, lines, wires and a pacemaker on the frontal film."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightmedvlm_utils.phantom.anatomy import SIGN, Anatomy
from lightmedvlm_utils.phantom.canvas import Canvas, ellipse, smooth_curve
from lightmedvlm_utils.phantom.chest import Chest
from lightmedvlm_utils.phantom.records import Finding


def draw_devices(chest: Chest, findings: Sequence[Finding]) -> list[tuple[Finding, np.ndarray]]:
    """Add every support device's attenuation to the chest and say where it lies."""
    marks = []
    for finding in findings:
        if finding.label == "Support Devices":
            rng = np.random.default_rng(finding.seed)
            metal = _DRAW[finding.kind](chest.canvas, chest.anatomy, finding, rng)
            chest.extra += metal * (0.7 + 0.3 * finding.severity)
            marks.append((finding, metal > 0.09))
    return marks


def _tube(canvas: Canvas, path, width: float, density: float, stripe: float = 0.0) -> np.ndarray:
    """A tube with denser walls; `stripe` adds a radiopaque line along it."""
    strokes = [(path, width, 1.0), (path, 0.5 * width, 0.55)]
    if stripe:
        strokes.append((path + np.array([0.25 * width, 0]), stripe, 1.0))
    return density * canvas.blur(canvas.strokes(strokes), 0.4)


def _endotracheal(canvas: Canvas, a: Anatomy, finding: Finding, rng) -> np.ndarray:
    tip = a.apex + 78 - rng.uniform(8, 55)
    x = rng.normal(0, 2.5)
    path = smooth_curve([(x + rng.normal(0, 4), -230), (x, -170), (0.5 * a.midline(tip) + x, tip)])
    return _tube(canvas, path, 10, 0.26, 2.6)


def _central_line(canvas: Canvas, a: Anatomy, finding: Finding, rng) -> np.ndarray:
    s, top = SIGN[finding.side], a.apex
    tip = (-0.9 * a.mediastinum + 4, top + rng.uniform(72, 125))
    if rng.random() < 0.5:  # through the jugular vein
        path = [(s * 46, -215), (s * 36, top - 20), (s * 22, top + 26)]
    else:  # through the subclavian vein
        path = [(s * 150, top + rng.uniform(25, 60)), (s * 95, top + 26), (s * 50, top + 18), (s * 24, top + 30)]
    path += [(-0.5 * a.mediastinum, top + 46), tip]
    return _tube(canvas, smooth_curve(path), 3.6, 0.30)


def _nasogastric(canvas: Canvas, a: Anatomy, finding: Finding, rng) -> np.ndarray:
    x, stomach = rng.normal(4, 3), a.dome["left"]
    path = [(x - 6, -230), (x, -120), (x + 4, -20), (x + 7, stomach), (rng.uniform(25, 45), stomach + 24),
            (rng.uniform(60, 85), stomach + rng.uniform(15, 50))]  # fmt: skip
    return _tube(canvas, smooth_curve(path), 5.0, 0.26, 2.2)


def _chest_tube(canvas: Canvas, a: Anatomy, finding: Finding, rng) -> np.ndarray:
    s, top = SIGN[finding.side], a.apex
    entry_y = top + rng.uniform(120, 190)
    entry = (s * (a.half_width + 45), entry_y + rng.uniform(0, 25))
    wall = (a.wall(finding.side, entry_y), entry_y)
    if finding.zone == "apical":
        tip = (s * rng.uniform(50, 80), top + rng.uniform(15, 45))
        middle = (s * (a.half_width - 28), (entry_y + tip[1]) / 2)
    else:
        tip = (s * rng.uniform(35, 60), a.dome[finding.side] - rng.uniform(0, 30))
        middle = (s * 85, (entry_y + tip[1]) / 2 + 8)
    return _tube(canvas, smooth_curve([entry, wall, middle, tip]), 8.5, 0.24, 2.6)


def _pacemaker(canvas: Canvas, a: Anatomy, finding: Finding, rng) -> np.ndarray:
    s, top = SIGN[finding.side], a.apex
    center = np.array([s * rng.uniform(82, 108), top + rng.uniform(38, 66)])
    box = ellipse(center, (rng.uniform(19, 24), rng.uniform(16, 21)), rng.uniform(-30, 30))
    bottom = max(a.dome.values())
    vein = [center + np.array([-s * 12, -16]), (s * 52, top + 22), (s * 20, top + 38), (-0.6 * a.mediastinum, top + 62)]
    ventricle = smooth_curve([*vein, (-30, bottom - 60), (-8, bottom - 14), (rng.uniform(35, 55), bottom - 12)])
    atrium = smooth_curve([*vein, (-36, bottom - 70), (-28, bottom - 50), (-34, bottom - 66)])
    wires = [(ventricle, 3.0, 1.0)] + ([(atrium, 3.0, 1.0)] if rng.random() < 0.7 else [])
    can = 0.55 * canvas.polygon(box) - 0.12 * canvas.polygon(center + 0.55 * (box - center))
    return np.maximum(can, 0.30 * canvas.blur(canvas.strokes(wires, depth=0.3), 0.3))


def _sternal_wires(canvas: Canvas, a: Anatomy, finding: Finding, rng) -> np.ndarray:
    x = rng.normal(0, 2)
    ys = np.linspace(a.apex + 48, a.apex + rng.uniform(150, 175), int(rng.integers(5, 8)))
    loops = []
    for y in ys:
        ring = ellipse((x + rng.normal(0, 1), y), (rng.uniform(8, 11), rng.uniform(4, 6)), rng.normal(0, 10), 16)
        loops.append((np.vstack([ring, ring[:2], ring[1] + [[4, -5]]]), 2.6, 1.0))
    return 0.34 * canvas.blur(canvas.strokes(loops, depth=1.0), 0.3)


_DRAW = {
    "endotracheal tube": _endotracheal,
    "central line": _central_line,
    "nasogastric tube": _nasogastric,
    "chest tube": _chest_tube,
    "pacemaker": _pacemaker,
    "sternal wires": _sternal_wires,
}
