"""The maps a frontal film is composed of: air, soft tissue, bones, vessels, and what findings add.

Attenuation is additive along the beam (the logarithm of Beer-Lambert's law); 1.0 is a mediastinum's worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightmedvlm_utils.phantom.anatomy import SIGN, Anatomy
from lightmedvlm_utils.phantom.canvas import Canvas, ellipse, smooth_curve
from lightmedvlm_utils.phantom.records import Study

_LUNG_AIR = 0.62  # attenuation a full depth of aerated lung takes away
_VESSELS = 0.13


@dataclass
class Chest:
    """The maps of one film while it is being composed, all float32 `(size, size)`.

    Findings change `filling` (share of the lung's air replaced by water), `vessels` and `extra`, and leave the
    composition to `attenuation`.
    """

    canvas: Canvas
    anatomy: Anatomy
    lungs: dict[str, np.ndarray]  # coverage of each lung, heart and mediastinum taken away
    whole_lungs: dict[str, np.ndarray]  # the same with what lies behind the heart
    heart: np.ndarray
    mediastinum: np.ndarray
    air: np.ndarray  # aerated depth 0..1
    tissue: np.ndarray  # attenuation of everything else
    body: np.ndarray
    bones: np.ndarray
    vessels: np.ndarray
    filling: np.ndarray
    extra: np.ndarray  # added attenuation, e.g. devices

    def fill(self, share: np.ndarray, only: str | None = None) -> np.ndarray:
        """Replace `share` of the air by water in both lungs or `only` one; the mask is where that shows."""
        within = self.whole_lungs[only] if only else np.maximum(*self.whole_lungs.values())
        share = share * within
        np.maximum(self.filling, share, out=self.filling)
        visible = share * np.clip(self.air * 2, 0, 1)
        return visible > max(0.06, 0.4 * float(visible.max()))

    def attenuation(self) -> np.ndarray:
        """The sum along the beam. Water in the lung hides vessels and borders, as on a real film."""
        air = self.air * (1 - np.clip(self.filling, -0.3, 1))
        total = self.tissue + self.bones * self.body - _LUNG_AIR * air
        total += _VESSELS * self.vessels * air + self.extra
        return total


def frontal_chest(canvas: Canvas, study: Study, anatomy: Anatomy) -> Chest:
    """Draw the normal chest of a study."""
    rng = np.random.default_rng((study.anatomy_seed, 1))
    whole = {side: canvas.polygon(anatomy.lung(side)) for side in SIGN}
    heart = canvas.blur(canvas.polygon(anatomy.heart(), depth=0.4), 1.3)
    middle = canvas.blur(canvas.polygon(anatomy.upper_mediastinum(), depth=0.2), 1.3)
    covered = np.maximum(heart, middle)
    lungs = {side: whole[side] * (1 - covered) for side in SIGN}
    body = canvas.blur(canvas.polygon(anatomy.body()), 3)
    body = body * (0.45 + 0.55 * canvas.blur(body, 22))  # the trunk is thinner toward the skin
    both = np.maximum(*whole.values())
    # Less air toward the rims, little behind heart and mediastinum.
    air = both * (0.35 + 0.65 * canvas.blur(both, 16)) * (1 - 0.86 * covered)
    tissue = _tissue(canvas, anatomy, body, rng) + 0.11 * heart + 0.07 * middle
    vessels = _vessels(canvas, anatomy, rng)
    zero = np.zeros_like(air)
    return Chest(
        canvas, anatomy, lungs, whole, heart, middle, air, tissue, body, zero, vessels, zero.copy(), zero.copy()
    )


def _tissue(canvas: Canvas, a: Anatomy, body: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Trunk, airway, breasts and the stomach's bubble."""
    fat = canvas.blob((0, 190), (170, 130))
    tissue = body * (0.86 + 0.07 * a.habitus + (0.10 + 0.08 * max(a.habitus, 0)) * fat)
    tissue += _airway(canvas, a) + _breasts(canvas, a)
    stomach = (rng.normal(60, 12), a.dome["left"] + 14 + rng.uniform(4, 16))
    bubble = ellipse(stomach, (rng.uniform(12, 36), rng.uniform(6, 17)), rng.normal(0, 12))
    tissue -= rng.uniform(0.05, 0.2) * canvas.blur(canvas.polygon(bubble), 3)
    return tissue.astype(np.float32)


def _airway(canvas: Canvas, a: Anatomy) -> np.ndarray:
    """Trachea and main bronchi, darker than the mediastinum."""
    carina = a.apex + 78
    trachea = smooth_curve([(a.midline(y) * 0.5, y) for y in (-200, -150, -110, carina)])
    bronchi = [smooth_curve([(0, carina - 3), (-16, carina + 14), (-34, carina + 34)]),
               smooth_curve([(0, carina - 3), (20, carina + 16), (44, carina + 28)])]  # fmt: skip
    lines = [(trachea, 15, 1.0), *((b, 10, 0.7) for b in bronchi)]
    return -0.13 * canvas.blur(canvas.strokes(lines), 2.6)


def _breasts(canvas: Canvas, a: Anatomy) -> np.ndarray | np.float32:
    if a.breasts == 0:
        return np.float32(0)
    y = 42 + 22 * a.breasts
    radii = (44 + 10 * a.breasts, 40 + 12 * a.breasts)
    outlines = [ellipse((s * (a.half_width - 48), y), radii, s * 12) for s in SIGN.values()]
    return 0.13 * a.breasts * canvas.blur(canvas.polygons(outlines, depth=1.0), 5)


def _vessels(canvas: Canvas, a: Anatomy, rng: np.random.Generator) -> np.ndarray:
    """Two branching trees from the hila, tapering toward the periphery."""
    starts, ends, widths = [], [], []
    for s in SIGN.values():
        n = 9
        position = np.tile([s * 34.0, -32.0], (n, 1)) + rng.normal(0, 5, (n, 2))
        heading = np.linspace(-1.45, 1.35, n) + rng.normal(0, 0.12, n)
        width = rng.uniform(5.0, 7.5, n)
        for level in range(5):
            length = (28 - 2.4 * level) * rng.uniform(0.7, 1.25, len(heading))
            step = np.stack([s * np.cos(heading), np.sin(heading) * 1.15], axis=1) * length[:, None]
            starts.append(position)
            ends.append(position + step)
            widths.append(width)
            fork = np.repeat(np.arange(len(heading)), 2 if level in (1, 2, 3) else 1)
            spread = rng.uniform(0.2, 0.5, len(fork)) * np.where(np.arange(len(fork)) % 2, 1, -1)
            position, width = ends[-1][fork], width[fork] * rng.uniform(0.62, 0.78, len(fork))
            heading = heading[fork] + (spread if level in (1, 2, 3) else 0.5 * spread)
    tree = canvas.segments(np.vstack(starts), np.vstack(ends), np.concatenate(widths))
    hila = sum(canvas.blob((s * 36, -30), (11, 17)) for s in SIGN.values())
    return np.clip(canvas.blur(tree, 1.0) + 0.75 * hila, 0, 1.3)
