"""From millimeters in the patient to pixels on the film: outlines, strokes, soft blobs and textures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

FILM_MM = 360.0  # side of the square film
_OVERSAMPLING = 2  # outlines are rasterized finer and averaged, which smooths their edges

Points = np.ndarray  # (n, 2) float, x to the patient's left and y down, millimeters from the film's center


class Canvas:
    """Rasterizes shapes given in millimeters for one view; all results are float32 `(size, size)` in 0..1.

    `depth` places a shape between the back (-1) and the front (1) of the chest: when the patient is turned,
    front and back move in opposite directions on the film.
    """

    def __init__(
        self,
        size: int,
        warp_seed: int,
        rotation: float = 0.0,
        turn: float = 0.0,
        magnification: float = 1.0,
        shift: tuple[float, float] = (0.0, 0.0),
    ):
        self.size = size
        self._turn_mm = 13.0 * turn
        angle = np.deg2rad(rotation)
        self._matrix = magnification * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self._offset = FILM_MM * np.asarray(shift)
        rng = np.random.default_rng(warp_seed)
        self._waves = rng.normal(0, 1, (4, 2)) / 45  # radians per millimeter
        self._phases = rng.uniform(0, 2 * np.pi, 4)
        self._amplitudes = rng.normal(0, 2.2, (4, 2))
        self._steps = np.arange(size, dtype=np.float32) + np.float32(0.5)

    def to_film(self, points: Points, depth: float = 0.0) -> Points:
        """Where the projection puts the given points, in pixels `(n, 2)`."""
        points = np.asarray(points, float)
        bent = points + np.sin(points @ self._waves.T * 0.6 + self._phases) @ self._amplitudes
        bent[:, 0] += self._turn_mm * depth
        return ((bent @ self._matrix.T + self._offset) / FILM_MM + 0.5) * self.size

    def px(self, mm: float) -> float:
        """Length on the film in pixels."""
        return mm / FILM_MM * self.size * float(np.hypot(*self._matrix[0]))

    def polygon(self, points: Points, depth: float = 0.0) -> np.ndarray:
        """A filled outline."""
        return self.polygons([points], depth)

    def polygons(self, outlines: Iterable[Points], depth: float = 0.0) -> np.ndarray:
        """The union of filled outlines."""
        image, draw = self._blank()
        for outline in outlines:
            draw.polygon(self._flat(outline, depth), fill=255)
        return _average(image)

    def strokes(self, lines: Iterable[tuple[Points, float, float]], depth: float = 0.0) -> np.ndarray:
        """Polylines `(points, width in mm, value 0..1)`; later ones cover earlier ones."""
        image, draw = self._blank()
        lines = list(lines)
        if not lines:
            return _average(image)
        film = self.to_film(np.vstack([points for points, _, _ in lines]), depth) * _OVERSAMPLING
        paths = np.split(film, np.cumsum([len(points) for points, _, _ in lines])[:-1])
        scale = self.px(1.0) * _OVERSAMPLING
        for path, (_, width, value) in zip(paths, lines, strict=True):
            if width * scale < 2.5:
                draw.line(path.ravel().tolist(), fill=round(255 * value), width=max(1, round(width * scale)))
            else:
                draw.polygon(_ribbon(path, width * scale / 2).ravel().tolist(), fill=round(255 * value))
        return _average(image)

    def segments(self, starts: Points, ends: Points, widths: Iterable[float], depth: float = 0.0) -> np.ndarray:
        """Many separate straight pieces, each with its own width in mm."""
        image, draw = self._blank()
        film = np.hstack([self.to_film(starts, depth), self.to_film(ends, depth)]) * _OVERSAMPLING
        scale = self.px(1.0) * _OVERSAMPLING
        for line, width in zip(film.tolist(), widths, strict=True):
            pixels = width * scale
            # A line narrower than a pixel is drawn one pixel wide and fainter.
            draw.line(line, fill=round(255 * min(1.0, pixels)), width=max(1, round(pixels)))
        return _average(image)

    def blob(self, center, radii: Sequence[float] | np.ndarray, angle: float = 0.0, depth: float = 0.0) -> np.ndarray:
        """A Gaussian hill of height 1; `radii` are standard deviations in mm, `angle` in degrees."""
        cx, cy = self.to_film(np.array([center]), depth)[0].astype(np.float32)
        x, y = self._steps[None, :] - cx, self._steps[:, None] - cy
        rx, ry = np.float32(self.px(radii[0])), np.float32(self.px(radii[1]))
        if angle == 0:  # the product of two curves
            return np.exp(-0.5 * (x / rx) ** 2) * np.exp(-0.5 * (y / ry) ** 2)
        c, s = np.float32(np.cos(np.deg2rad(angle))), np.float32(np.sin(np.deg2rad(angle)))
        return np.exp(-0.5 * (((c * x + s * y) / rx) ** 2 + ((c * y - s * x) / ry) ** 2))

    def texture(self, rng: np.random.Generator, cell_mm: float) -> np.ndarray:
        """Smooth random field with mean 0 and standard deviation near 1, detail of about `cell_mm`."""
        n = round(2.5 * FILM_MM / cell_mm) + 6
        # Filtered, so that the grid does not show; the rim that the filter cannot fill is cut off.
        coarse = 3.4 * gaussian_filter(rng.standard_normal((n, n), dtype=np.float32), 1.0)[3:-3, 3:-3]
        image = Image.fromarray(coarse)
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def blur(self, field: np.ndarray, mm: float) -> np.ndarray:
        """Gaussian blur with standard deviation `mm`; wide ones are computed on a coarser grid."""
        sigma = self.px(mm)
        factor = max(1, int(sigma / 0.9))
        if factor == 1:
            return _smooth(field, sigma)
        coarse = Image.fromarray(field).reduce(factor)
        smooth = _smooth(np.asarray(coarse), sigma / factor)
        resized = Image.fromarray(smooth).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(resized)

    def _blank(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new("L", (self.size * _OVERSAMPLING,) * 2)
        return image, ImageDraw.Draw(image)

    def _flat(self, points: Points, depth: float) -> list[float]:
        return (self.to_film(points, depth) * _OVERSAMPLING).ravel().tolist()


def smooth_curve(
    points: Points | Sequence[Sequence[float] | Points], per_span: int = 6, closed: bool = False
) -> Points:
    """Catmull-Rom curve through the control points; a point given twice makes a corner."""
    control = np.asarray(points, float)
    if closed:
        p0, p1, p2, p3 = (np.roll(control, shift, axis=0) for shift in (1, 0, -1, -2))
    else:
        padded = np.vstack([control[:1], control, control[-1:]])
        p0, p1, p2, p3 = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = np.linspace(0, 1, per_span, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (p[:, None, :] for p in (p0, p1, p2, p3))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    curve = curve.reshape(-1, 2)
    return curve if closed else np.vstack([curve, control[-1:]])


def ellipse(center, radii, angle: float = 0.0, n: int = 40) -> Points:
    """Outline of an ellipse; radii in mm, angle in degrees."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    turn = np.deg2rad(angle)
    x, y = radii[0] * np.cos(t), radii[1] * np.sin(t)
    rotated = np.stack([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y], axis=1)
    return np.asarray(center, float) + rotated


def _smooth(field: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian filter for small `sigma` in single precision, twice as fast here as scipy's in double."""
    radius = max(1, int(2.6 * sigma + 0.5))
    kernel = np.exp(-0.5 * (np.arange(radius + 1) / max(sigma, 1e-3)) ** 2)
    kernel = (kernel / (2 * kernel.sum() - kernel[0])).astype(np.float32)
    for _ in range(2):  # rows, then columns
        n = len(field)
        padded = np.concatenate([np.repeat(field[:1], radius, 0), field, np.repeat(field[-1:], radius, 0)])
        out = kernel[0] * field
        for k in range(1, radius + 1):
            out += kernel[k] * (padded[radius - k : radius - k + n] + padded[radius + k : radius + k + n])
        field = np.ascontiguousarray(out.T)
    return field


def _ribbon(path: np.ndarray, half: float) -> np.ndarray:
    """Outline of a thick line: the path moved to either side."""
    tangent = np.empty_like(path)
    tangent[1:-1] = path[2:] - path[:-2]
    tangent[0], tangent[-1] = path[1] - path[0], path[-1] - path[-2]
    length = np.maximum(np.hypot(tangent[:, 0], tangent[:, 1]), 1e-9)
    normal = tangent[:, ::-1] * ((-half, half) / length[:, None])
    return np.concatenate([path + normal, (path - normal)[::-1]])


def _average(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(_OVERSAMPLING), dtype=np.float32) * np.float32(1 / 255)
