"""Anatomy of the frontal chest: outlines and center lines in millimeters, as one patient has them on one day.

Left and right are the patient's. The patient faces the reader, so the patient's left has positive x; y runs down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from lightmedvlm_utils.phantom.canvas import Points, smooth_curve
from lightmedvlm_utils.phantom.records import Finding, Study

SIGN = {"left": 1.0, "right": -1.0}
RIBS = range(1, 10)
# Height of each zone, from 0 at the lung's apex to 1 at its diaphragm.
ZONES = {"apical": (0.05, 0.2), "upper": (0.2, 0.4), "mid": (0.42, 0.62), "lower": (0.66, 0.88), "basal": (0.86, 0.97)}


@dataclass
class Anatomy:
    """Sizes of one patient on one day, in millimeters unless said otherwise."""

    half_width: float  # inner chest wall at its widest
    apex: float  # y of the lung tops
    dome: dict[str, float]  # y of each diaphragm's top
    heart_ratio: float  # cardiothoracic ratio
    mediastinum: float  # half-width above the heart
    knob: float  # bulge of the aortic arch
    spine_bend: float
    rib_slope: float
    clavicle_slope: float
    habitus: float
    breasts: float  # 0 for none

    @classmethod
    def sample(cls, study: Study) -> Self:
        """The normal variation of a patient, then what the study's findings do to the geometry."""
        rng = np.random.default_rng(study.anatomy_seed)
        inspiration, habitus = study.inspiration, study.habitus
        half_width = 122 + rng.normal(0, 7) + (4 if study.sex == "M" else -4) + 3 * inspiration
        right_dome = 40 + 42 * inspiration - 9 * max(habitus, 0) + rng.normal(0, 6)
        left_dome = right_dome + rng.normal(9, 6)
        anatomy = cls(
            half_width=float(half_width),
            apex=float(-134 + rng.normal(0, 5)),
            dome={"right": float(right_dome), "left": float(left_dome)},
            heart_ratio=float(0.435 + rng.normal(0, 0.022) + 0.02 * (0.6 - inspiration)),
            mediastinum=float(26.5 + rng.normal(0, 3.5) + 2 * habitus),
            knob=float(6 + 0.1 * max(study.age - 40, 0) + rng.normal(0, 2)),
            spine_bend=float(rng.normal(0, 5)),
            rib_slope=float(0.30 + rng.normal(0, 0.06) - 0.1 * habitus),
            clavicle_slope=float(rng.normal(-0.16, 0.1)),
            habitus=habitus,
            breasts=float(np.clip(0.55 + 0.4 * habitus + rng.normal(0, 0.2), 0.15, 1.1)) if study.sex == "F" else 0.0,
        )
        for finding in study.findings:
            anatomy._deform(finding)
        return anatomy

    def _deform(self, finding: Finding) -> None:
        s = finding.severity
        if finding.label == "Cardiomegaly":
            self.heart_ratio = 0.50 + 0.15 * s + (self.heart_ratio - 0.435)
        elif finding.label == "Enlarged Cardiomediastinum":
            self.mediastinum += 7 + 19 * s
        elif finding.label == "Atelectasis" and finding.kind != "linear atelectasis":
            for side in SIGN:
                if finding.side in (side, "bilateral") and finding.zone != "upper":
                    self.dome[side] -= 24 * s  # lost volume pulls the diaphragm up

    def midline(self, y: float) -> float:
        """x of the spine at height y."""
        return self.spine_bend * float(np.sin(y / 75))

    def wall(self, side: str, y: float) -> float:
        """x of the inner chest wall at height y."""
        t = float(np.clip((y - self.apex) / (self.cp_angle(side) - self.apex), 0, 1))
        return SIGN[side] * self.half_width * (1 - (1 - t) ** 3.4) ** 0.42 * (1 - 0.03 * t * t)

    def cp_angle(self, side: str) -> float:
        """y of the costophrenic angle."""
        return 0.55 * self.dome[side] + 62

    def place(self, side: str, u: float, v: float) -> np.ndarray:
        """Point (x, y) at fraction `u` from hilum to wall and `v` from apex to diaphragm of a lung."""
        y = self.apex + v * (self.dome[side] - self.apex)
        inner = 34 + 22 * v * (side == "left")
        outer = max(abs(self.wall(side, y)), inner + 30)
        return np.array([SIGN[side] * (inner + u * (outer - inner)), y])

    def lung(self, side: str) -> Points:
        """Outline of one lung; its medial edge runs behind heart and mediastinum."""
        s, w, top, dome, cp = SIGN[side], self.half_width, self.apex, self.dome[side], self.cp_angle(side)
        lateral = [(self.wall(side, y), y) for y in top + (cp - top) * np.linspace(0.16, 0.98, 9) ** 2]
        corner = (self.wall(side, cp), cp)
        base = [(s * 0.82 * w, dome + 8), (s * 0.55 * w, dome), (s * 0.28 * w, dome + 6), (s * 10, dome + 10)]
        medial = [(s * 8, 0), (s * 12, top + 62), (s * 17, top + 26), (s * 28, top + 4)]
        return smooth_curve([*lateral, corner, corner, *base, base[-1], *medial], closed=True)

    def heart(self) -> Points:
        """Outline of the heart: two thirds of it lie left of the midline."""
        width = 2 * self.half_width * self.heart_ratio
        right, left = -0.33 * width, 0.67 * width
        bottom = max(self.dome.values()) + 14
        height = 0.86 * width
        top = bottom - height
        outline = [
            (right * 0.72, top + 0.2 * height), (right, top + 0.55 * height), (right * 0.85, bottom - 8),
            (0, bottom + 4), (left * 0.75, bottom), (left * 0.99, bottom - 0.20 * height),
            (left * 0.9, bottom - 0.42 * height), (left * 0.58, top + 0.26 * height), (left * 0.3, top),
            (0, top - 6),
        ]  # fmt: skip
        return smooth_curve(outline, closed=True)

    def upper_mediastinum(self) -> Points:
        """Outline of the great vessels above the heart, with the aortic knob on the left."""
        m, knob, top = self.mediastinum, self.knob, self.apex
        right = [
            (-m * 0.75, top - 40),
            (-m * 0.8, top + 10),
            (-m, top + 50),
            (-m * 1.05, -10),
            (-m * 0.8, 30),
            (-10, 60),
        ]
        left = [(10, 60), (m * 0.9, 30), (m * 1.15, -15), (m * 0.95, -38), (m + knob, -58), (m * 0.9 + knob * 0.6, -76),
                (m * 0.78, top + 36), (m * 0.75, top - 40)]  # fmt: skip
        return smooth_curve([*right, *left], closed=True)

    def posterior_rib(self, side: str, k: int) -> Points:
        """Center line of rib k from the spine to the lateral wall."""
        y0 = self.apex + 6 + (k - 1) * 22.5
        drop = self.rib_slope * 95 + 3 * k
        end_x = abs(self.wall(side, min(y0 + drop, self.cp_angle(side)))) + 3
        t = np.linspace(0, 1, 18)
        x = 15 + (end_x - 15) * np.sin(t * np.pi / 2) ** 0.9
        y = y0 - 7 * np.sin(np.pi * np.clip(t * 1.6, 0, 1)) + drop * t**2.2
        return np.stack([SIGN[side] * x, y], axis=1)

    def anterior_rib(self, side: str, k: int) -> Points:
        """Center line of rib k from the lateral wall to its cartilage."""
        start = self.posterior_rib(side, k)[-1]
        t = np.linspace(0, 1, 12)
        end_x = 42 + 6 * k
        x = end_x + (abs(start[0]) - end_x) * np.cos(t * np.pi / 2) ** 0.8
        y = start[1] + (34 + 4 * k) * (1.5 * self.rib_slope + 0.35) * t**0.8
        return np.stack([SIGN[side] * x, y], axis=1)

    def clavicle(self, side: str) -> Points:
        """Center line of the clavicle from the sternum outward."""
        s, y0, slope = SIGN[side], self.apex + 40, self.clavicle_slope
        xs = np.array([14, 40, 75, 110, 140, 165])
        ys = y0 + slope * (xs - 14) + np.array([4, 5, -1, -7, -6, 0])
        return smooth_curve(np.stack([s * xs, ys], axis=1))

    def scapula(self, side: str) -> Points:
        """Outline of the shoulder blade, mostly lateral to the lung."""
        s, x, y = SIGN[side], self.half_width, self.apex
        return smooth_curve(
            [(s * (x + 32), y + 14), (s * (x - 14), y + 22), (s * (x - 24), y + 60), (s * (x - 4), y + 128),
             (s * (x + 10), y + 110), (s * (x + 26), y + 56)], closed=True)  # fmt: skip

    def body(self) -> Points:
        """Skin outline: neck, shoulders and trunk; the arms leave the film at the sides."""
        neck, wall = 52 + 10 * self.habitus, self.half_width + 26 + 20 * self.habitus
        half = [(neck, -230), (neck, -172), (neck + 25, -160), (140, -140), (205, -112), (236, -40),
                (238, 30), (wall + 34, 34), (wall + 8, 22), (wall, 60), (wall + 2, 120), (wall + 6, 240)]  # fmt: skip
        right = smooth_curve([(-x, y) for x, y in half])
        return np.vstack([right, smooth_curve(half)[::-1]])
