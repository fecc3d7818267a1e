"""Draw a study's radiographs: patient model -> attenuation -> film, with a mask for every finding."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from lightmedvlm_utils.phantom.anatomy import Anatomy
from lightmedvlm_utils.phantom.canvas import Canvas
from lightmedvlm_utils.phantom.chest import frontal_chest
from lightmedvlm_utils.phantom.devices import draw_devices
from lightmedvlm_utils.phantom.lateral import LateralAnatomy, draw_lateral_devices, lateral_chest
from lightmedvlm_utils.phantom.pathology import LATERAL_FINDINGS, draw_findings
from lightmedvlm_utils.phantom.records import Finding, Study, View
from lightmedvlm_utils.phantom.skeleton import draw_skeleton

_MIN_MASK_PIXELS = 3
Marks = list[tuple[Finding, np.ndarray]]


def render(study: Study, view: View, size: int = 256) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Image uint8 `(size, size)` and, for each label drawn, a boolean mask of the same shape.

    The same study, view and size give the same bytes. A finding that this projection does not show (or that
    lies outside the film) has no mask.
    """
    rng = np.random.default_rng(view.seed)
    canvas = Canvas(size, study.anatomy_seed, view.rotation, view.turn, view.magnification, view.shift)
    draw = _lateral if view.position == "LATERAL" else _frontal
    attenuation, masks = draw(canvas, study, view)
    film = _expose(canvas, attenuation, view, rng)
    film = _finish(film, view, rng)
    return film, {label: mask for label, mask in masks.items() if mask.sum() >= _MIN_MASK_PIXELS}


def _frontal(canvas: Canvas, study: Study, view: View) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    anatomy = Anatomy.sample(study)
    if view.position == "AP":  # the heart is farther from the film and magnified
        anatomy.heart_ratio *= 1.05
    chest = frontal_chest(canvas, study, anatomy)
    fractures = [f for f in study.findings if f.label == "Fracture"]
    chest.bones, marks = draw_skeleton(canvas, anatomy, fractures)
    marks += draw_findings(chest, study.findings) + draw_devices(chest, study.findings)
    return chest.attenuation(), _by_label(marks)


def _lateral(canvas: Canvas, study: Study, view: View) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    chest = lateral_chest(canvas, study, LateralAnatomy.sample(study))
    seen = [f for f in study.findings if f.label in LATERAL_FINDINGS]
    marks = draw_findings(chest, seen) + draw_lateral_devices(chest, study.findings)
    return chest.attenuation(), _by_label(marks)


def _by_label(marks: Marks) -> dict[str, np.ndarray]:
    masks: dict[str, np.ndarray] = {}
    for finding, mask in marks:
        masks[finding.label] = masks.get(finding.label, False) | mask
    return masks


def _expose(canvas: Canvas, attenuation: np.ndarray, view: View, rng: np.random.Generator) -> np.ndarray:
    """Film curve with toe and shoulder, uneven exposure, scatter and grain; result in 0..1."""
    slope = 0.06 * canvas.texture(rng, 260)
    blurred = canvas.blur(attenuation, 0.5)
    scattered = 0.93 * blurred + 0.07 * canvas.blur(attenuation, 14)
    film = 1 / (1 + np.exp(-4.6 * view.contrast * (scattered + slope - 0.60 - 0.12 * view.exposure)))
    grain = rng.standard_normal(film.shape, dtype=np.float32)
    return film + view.noise * (0.6 + 0.8 * film) * grain


def _finish(film: np.ndarray, view: View, rng: np.random.Generator) -> np.ndarray:
    """Collimation borders and the side marker, then eight bits."""
    size = len(film)
    image = Image.fromarray(np.clip(255 * film, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = (round(size * border) for border in view.collimation)
    shade = int(rng.integers(0, 14))
    borders = [(0, 0, left, size), (0, 0, size, top), (size - right, 0, size, size)]
    for box in [*borders, (0, size - bottom, size, size)]:
        if box[2] > box[0] and box[3] > box[1]:
            draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=shade)
    _marker(draw, size, view, rng)
    return np.array(image)


def _marker(draw: ImageDraw.ImageDraw, size: int, view: View, rng: np.random.Generator) -> None:
    """A lead letter in a corner; on frontal films it stands on the patient's own side."""
    letter = "L" if view.position == "LATERAL" or rng.random() < 0.6 else "R"
    x = rng.uniform(0.86, 0.93) if letter == "L" else rng.uniform(0.05, 0.10)
    y = rng.uniform(0.05, 0.18)
    height = size * rng.uniform(0.035, 0.05)
    draw.text((x * size, y * size), letter, fill=int(rng.integers(225, 256)), font_size=height)
