"""The lateral film: the patient seen from the left side, chest to the left edge, both lungs superimposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightmedvlm_utils.phantom.anatomy import SIGN, Anatomy
from lightmedvlm_utils.phantom.canvas import Canvas, Points, ellipse, smooth_curve
from lightmedvlm_utils.phantom.chest import Chest
from lightmedvlm_utils.phantom.records import Finding, Study


@dataclass
class LateralAnatomy(Anatomy):
    """The same patient from the side: `x` runs from the sternum (negative) to the back."""

    @property
    def depth(self) -> float:
        """Distance from sternum to the back of the lungs, mm."""
        return 1.42 * self.half_width

    def wall(self, side: str, y: float) -> float:
        """x of the posterior chest wall: the thoracic kyphosis."""
        t = (y - self.apex) / 240
        return self.depth * (0.22 + 0.34 * float(np.sin(np.pi * np.clip(0.68 * t + 0.14, 0, 1)) ** 0.7))

    def front(self, y: float) -> float:
        """x of the anterior chest wall: the sternum slopes forward."""
        t = float(np.clip((y - self.apex) / 220, 0, 1))
        return -self.depth * (0.08 + 0.42 * t**0.55)

    def cp_angle(self, side: str) -> float:
        return self.dome[side] + 52

    def place(self, side: str, u: float, v: float) -> np.ndarray:
        """Point at fraction `u` from front to back; the two sides mirror each other to vary the place."""
        y = self.apex + v * (self.dome[side] - self.apex)
        u = u if side == "left" else 1 - u
        return np.array([self.front(y) + u * (self.wall(side, y) - self.front(y)), y])

    def lung(self, side: str) -> Points:
        top, dome, cp = self.apex, self.dome[side], self.cp_angle(side)
        back = [(self.wall(side, y), y) for y in np.linspace(top + 12, cp - 14, 7)]
        corner = (self.wall(side, cp) - 4, cp)
        base = [(0.30 * self.depth, dome + 22), (0.02 * self.depth, dome + 1), (-0.25 * self.depth, dome + 3)]
        low_front = (self.front(dome + 16), dome + 18)
        front = [(self.front(y), y) for y in np.linspace(dome - 12, top + 34, 5)]
        apex = [(-0.06 * self.depth, top + 6), (0.1 * self.depth, top - 2)]
        return smooth_curve([*back, corner, corner, *base, low_front, low_front, *front, *apex], closed=True)

    def heart(self) -> Points:
        scale = self.heart_ratio / 0.44
        bottom = self.dome["left"] + 6
        center = (self.front(bottom - 40) + 10 + 38 * scale, bottom - 38 * scale)
        return ellipse(center, (45 * scale, 60 * scale), -28)

    def upper_mediastinum(self) -> Points:
        """Great vessels and arch between heart and spine."""
        m, top = self.mediastinum, self.apex
        return smooth_curve(
            [(-0.5 * m, top + 40), (-0.5 * m, top + 90), (-0.3 * m, 20), (0.5 * m, 10), (0.75 * m, -40),
             (0.9 * m, top + 66), (0.4 * m, top + 40)], closed=True)  # fmt: skip

    def body(self) -> Points:
        thick = 20 + 16 * self.habitus
        ys = np.linspace(-100, 230, 9)
        bulge = 26 * self.breasts * np.exp(-(((ys - 45) / 50) ** 2))
        front = [(self.front(y) - thick - b, y) for y, b in zip(ys, bulge, strict=True)]
        back = [(self.wall("left", min(y, 150)) + 34 + thick, y) for y in ys[::-1]]
        return smooth_curve([(-46, -230), (-52, -160), *front, *back, (60, -160), (52, -230)])


@dataclass
class LateralChest(Chest):
    """The maps of one lateral film."""

    anatomy: LateralAnatomy


def lateral_chest(canvas: Canvas, study: Study, anatomy: LateralAnatomy) -> LateralChest:
    """Draw the normal chest of a study from the side."""
    rng = np.random.default_rng((study.anatomy_seed, 2))
    whole = {side: canvas.polygon(anatomy.lung(side)) for side in SIGN}
    heart = canvas.blur(canvas.polygon(anatomy.heart()), 3.0)
    middle = canvas.blur(canvas.polygon(anatomy.upper_mediastinum()), 5)
    body = canvas.blur(canvas.polygon(anatomy.body()), 2.5)
    body = body * (0.45 + 0.55 * canvas.blur(body, 20))
    both = np.minimum(*whole.values()) * 0.72 + np.maximum(*whole.values()) * 0.28
    air = both * (0.4 + 0.6 * canvas.blur(both, 16)) * (1 - 0.64 * heart) * (1 - 0.35 * middle)
    shoulders = canvas.blob((10, anatomy.apex - 5), (60, 32))
    tissue = body * (0.92 + 0.08 * anatomy.habitus + 0.14 * shoulders + 0.06 * canvas.blob((0, 180), (160, 90)))
    tissue += 0.04 * heart + 0.03 * middle + _airway(canvas, anatomy)
    zero = np.zeros_like(air)
    bones = _bones(canvas, anatomy)
    vessels = _vessels(canvas, anatomy, rng)
    return LateralChest(canvas, anatomy, whole, whole, heart, middle, air, tissue.astype(np.float32), body, bones,
                        vessels, zero, zero.copy())  # fmt: skip


def _airway(canvas: Canvas, a: LateralAnatomy) -> np.ndarray:
    trachea = smooth_curve([(-6, -220), (0, a.apex), (10, a.apex + 50), (14, a.apex + 84)])
    return -0.13 * canvas.blur(canvas.strokes([(trachea, 15, 1.0)]), 2.6)


def _bones(canvas: Canvas, a: LateralAnatomy) -> np.ndarray:
    """Spine, sternum and the ribs running obliquely forward."""
    ys = np.arange(a.apex - 60, 200, 25.0)
    bodies = [ellipse((a.wall("left", y) - 8, y), (17, 11), -8, n=16) for y in ys]
    spine = 0.12 * canvas.polygons(bodies) - 0.04 * canvas.polygons(
        [ellipse((a.wall("left", y) - 8, y), (13, 8), -8, n=16) for y in ys]
    )
    sternum = [(np.array([(a.front(y) - 7, y) for y in np.linspace(a.apex + 45, 50, 12)]), 9, 1.0)]
    ribs = []
    for k in range(9):
        y0 = a.apex + 12 + 23 * k
        start, end = a.wall("left", y0) + 14, a.front(y0 + 60) + 6
        path = smooth_curve([(start, y0), (start - 30, y0 + 22), ((start + end) / 2, y0 + 48), (end, y0 + 62)])
        ribs += [(path, 8, 1.0), (path, 5, 0.6)]
    field = 0.09 * canvas.strokes(ribs) + 0.12 * canvas.strokes(sternum)
    return canvas.blur(field + spine, 1.1)


def _vessels(canvas: Canvas, a: LateralAnatomy, rng: np.random.Generator) -> np.ndarray:
    root = np.array([12.0, a.apex + 96])
    angles = np.repeat(np.linspace(0, 2 * np.pi, 13), 2) + rng.normal(0, 0.2, 26)
    near = root + rng.normal(0, 6, (26, 2))
    middle = near + 32 * np.stack([np.cos(angles), 1.2 * np.sin(angles)], axis=1)
    bent = angles + rng.normal(0, 0.35, 26)
    far = middle + 40 * np.stack([np.cos(bent), 1.2 * np.sin(bent)], axis=1)
    widths = rng.uniform(2.5, 4.5, 26)
    tree = canvas.segments(np.vstack([near, middle]), np.vstack([middle, far]), [*widths, *(0.6 * widths)])
    return np.clip(canvas.blur(tree, 1.0) + canvas.blob(root, (15, 17)), 0, 1.3)


def draw_lateral_devices(chest: LateralChest, findings: Sequence[Finding]) -> list[tuple[Finding, np.ndarray]]:
    """Devices from the side, schematically along the airway, the great veins, the gullet and the sternum."""
    marks = []
    for finding in findings:
        if finding.label == "Support Devices":
            rng = np.random.default_rng(finding.seed)
            strokes = _device_strokes(chest.anatomy, finding, rng)
            metal = 0.3 * chest.canvas.blur(chest.canvas.strokes(strokes), 0.4)
            if finding.kind == "pacemaker":
                a = chest.anatomy
                can = ellipse((a.front(a.apex + 55) - 4, a.apex + 55), (9, 22), -20)
                metal = np.maximum(metal, 0.55 * chest.canvas.polygon(can))
            chest.extra += metal * (0.7 + 0.3 * finding.severity)
            marks.append((finding, metal > 0.09))
    return marks


def _device_strokes(a: LateralAnatomy, finding: Finding, rng: np.random.Generator):
    top, bottom = a.apex, a.dome["left"]
    if finding.kind == "sternal wires":
        ys = np.linspace(top + 55, top + 165, int(rng.integers(5, 8)))
        rings = [ellipse((a.front(y) - 4, y), (7, 4), -20, 16) for y in ys]
        return [(np.vstack([ring, ring[:1]]), 2.6, 1.0) for ring in rings]
    paths: dict[str, tuple[list[tuple[float, float]], float]] = {
        "endotracheal tube": ([(-6, -225), (0, top), (6, top + rng.uniform(25, 65))], 8.0),
        "nasogastric tube": ([(8, -225), (16, top), (22, 0), (14, bottom), (-20, bottom + 35)], 4.5),
        "central line": ([(-4, top - 40), (-12, top + 40), (-8, top + rng.uniform(75, 120))], 3.6),
        "chest tube": ([(70, 120), (60, 60), (20, 10), (-5, top + 60)], 7.5),
        "pacemaker": ([(a.front(top + 50), top + 50), (-22, top + 30), (-8, top + 90), (-12, bottom - 50),
                       (a.front(bottom - 25) + 34, bottom - 25)], 3.0),
    }  # fmt: skip
    path, width = paths[finding.kind]
    return [(smooth_curve(path), width, 1.0)]
