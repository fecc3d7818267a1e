"""Bones of the frontal chest, with the fractures a study has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightmedvlm_utils.phantom.anatomy import RIBS, SIGN, Anatomy
from lightmedvlm_utils.phantom.canvas import Canvas, Points, smooth_curve
from lightmedvlm_utils.phantom.records import Finding

# The topmost broken rib; up to two below it may be broken as well.
_ZONE_RIBS = {"upper": (2, 3), "mid": (4, 5), "lower": (6, 7)}


def draw_skeleton(
    canvas: Canvas, anatomy: Anatomy, fractures: Sequence[Finding]
) -> tuple[np.ndarray, list[tuple[Finding, np.ndarray]]]:
    """Attenuation of the bones, and for every fracture the place where it shows."""
    ribs = {(side, k): [anatomy.posterior_rib(side, k)] for side in SIGN for k in RIBS}
    clavicles = {side: [anatomy.clavicle(side)] for side in SIGN}
    ends, callus, marks = [], [], []
    for finding in fractures:
        rng = np.random.default_rng(finding.seed)
        collar = finding.kind == "clavicle fracture"
        depth, width, step = (0.9, 13, 26) if collar else (-0.8, 11.5, 23)
        mask = np.zeros((canvas.size, canvas.size), bool)
        at = rng.uniform(0.30, 0.55)
        for bones_of, key in _broken_bones(finding, rng, ribs, clavicles):
            pieces, site = _break(bones_of[key][0], finding.severity, at + rng.normal(0, 0.03), rng, step)
            bones_of[key] = pieces
            value = 0.2 + 0.8 * finding.severity
            ends += [(depth, piece, width, value) for piece in (pieces[0][-13:], pieces[1][:13])]
            spot = canvas.blob(site, (5, 5), depth=depth)
            callus.append(finding.severity * spot)
            mask |= spot > 0.03
        marks.append((finding, mask))
    bones = _ribs(canvas, anatomy, ribs) + _spine(canvas, anatomy) + _girdle(canvas, anatomy, clavicles)
    for depth, piece, width, value in ends:  # the broken ends are sclerotic, the gap holds callus
        bones += 0.20 * canvas.strokes([(piece, width, value)], depth)
    for spot in callus:
        bones += 0.10 * spot
    return canvas.blur(bones, 0.9), marks


def _broken_bones(finding: Finding, rng: np.random.Generator, ribs: dict, clavicles: dict):
    """The clavicle, or one to three neighboring ribs: the harder the blow, the more."""
    if finding.kind == "clavicle fracture":
        return [(clavicles, finding.side)] if len(clavicles[finding.side]) == 1 else []
    first = int(rng.choice(_ZONE_RIBS[finding.zone]))
    count = 1 + (finding.severity > 0.3) + (finding.severity > 0.7)
    return [(ribs, (finding.side, first + k)) for k in range(count) if len(ribs[finding.side, first + k]) == 1]


def _break(line: Points, severity: float, fraction: float, rng: np.random.Generator, step_mm: float):
    """Cut a bone's center line, push the outer piece out of line and open a gap; also the site (x, y)."""
    line = smooth_curve(line, 4)
    at = int(len(line) * np.clip(fraction, 0.2, 0.7))
    tangent = line[at + 1] - line[at]
    tangent = tangent / np.linalg.norm(tangent)
    normal = np.array([-tangent[1], tangent[0]]) * rng.choice([-1, 1])
    outer = line[at + 1 :] + normal * step_mm * severity
    angle = 0.5 * severity * rng.choice([-1, 1])
    c, s = np.cos(angle), np.sin(angle)
    outer[:9] = outer[0] + (outer[:9] - outer[0]) @ np.array([[c, s], [-s, c]])
    return [line[:at], outer], tuple(line[at] + 0.5 * step_mm * severity * normal)


def _outlined(pieces: Sequence[Points], width: float, core: float) -> list[tuple[Points, float, float]]:
    """Strokes of a tubular bone: a bright cortex around a fainter core."""
    return [(p, width, 1.0) for p in pieces] + [(p, 0.62 * width, core) for p in pieces]


def _ribs(canvas: Canvas, a: Anatomy, posterior: dict) -> np.ndarray:
    back = [stroke for pieces in posterior.values() for stroke in _outlined(pieces, 9.5, 0.62)]
    front = [s for side in SIGN for k in RIBS if 1 < k < 7 for s in _outlined([a.anterior_rib(side, k)], 11, 0.6)]
    ribs = 0.15 * canvas.strokes(back, depth=-0.8) + 0.075 * canvas.strokes(front, depth=0.8)
    return ribs


def _spine(canvas: Canvas, a: Anatomy) -> np.ndarray:
    """Vertebral bodies with end plates and discs between them, pedicles and spinous processes."""
    ys = np.arange(-190, 190, 24.0)
    bodies = [_vertebra(a.midline(y), y, 17, 19) for y in ys]
    cores = [_vertebra(a.midline(y), y, 14, 14) for y in ys]
    spots = [(np.array([[a.midline(y) + dx, y - 4], [a.midline(y) + dx, y + 3]]), 5.0, 1.0)
             for y in ys for dx in (-11, 11)]  # fmt: skip
    spots += [(np.array([[a.midline(y), y + 4], [a.midline(y), y + 12]]), 4.0, 1.0) for y in ys]
    field = 0.11 * canvas.polygons(bodies, depth=-0.7) - 0.045 * canvas.polygons(cores, depth=-0.7)
    return field + 0.05 * canvas.strokes(spots, depth=-1.0)


def _vertebra(x: float, y: float, half_width: float, height: float) -> Points:
    h = height / 2
    return np.array(
        [(x - half_width, y - h), (x + half_width, y - h), (x + 0.9 * half_width, y),
         (x + half_width, y + h), (x - half_width, y + h), (x - 0.9 * half_width, y)]
    )  # fmt: skip


def _girdle(canvas: Canvas, a: Anatomy, clavicles: dict[str, list[Points]]) -> np.ndarray:
    """Clavicles, shoulder blades, upper arms and the manubrium."""
    collar = [stroke for pieces in clavicles.values() for stroke in _outlined(pieces, 12, 0.6)]
    blades = [a.scapula(side) for side in SIGN]
    borders = [(np.vstack([blade, blade[:1]]), 3.0, 1.0) for blade in blades]
    arms = [(smooth_curve([(s * (a.half_width + 30), a.apex + 16), (s * (a.half_width + 52), a.apex + 80),
                           (s * (a.half_width + 62), a.apex + 170)]), 24, 1.0) for s in SIGN.values()]  # fmt: skip
    manubrium = np.array([(-24, a.apex + 30), (24, a.apex + 30), (14, a.apex + 72), (-14, a.apex + 72)])
    field = 0.17 * canvas.strokes(collar, depth=0.9) + 0.05 * canvas.strokes(borders, depth=-1.0)
    field += 0.05 * canvas.polygons(blades, depth=-1.0) + 0.14 * canvas.strokes(arms)
    return field + 0.03 * canvas.polygon(manubrium, depth=1.0)
