"""How well could anyone see the phantom's findings? An ideal observer's AUROC for each, at the size the encoder gets.

Each study is drawn with and without one finding, all else and the grain alike. Against white grain of known strength an
observer that knows both films tells them apart with d' = the norm of their difference in units of the grain, and an
AUROC of Phi(d' / sqrt 2): the ceiling that noise and resolution set (Barrett and Myers, Foundations of Image Science,
2004, ch. 13). It knows the anatomy and the place, so a reader who does not stays below; but where it is 1, a low AUROC
is the reader's, not the film's.

    python benchmarks/ceiling.py [--patients 400] [--size 256] [--input 224]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import norm

from lightmedvlm_utils.phantom.images import render
from lightmedvlm_utils.phantom.patients import Study, View, sample_patients, without_finding

SEED = 5_000_000  # no patient of a course run or of a pretraining


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=400)
    parser.add_argument("--size", type=int, default=256, help="pixels of the films")
    parser.add_argument("--input", type=int, default=224, help="pixels that the encoder gets")
    options = parser.parse_args()
    rows = []
    for patient in sample_patients(options.patients, SEED):
        study = patient.studies[0]
        view = next(view for view in study.views if view.position != "LATERAL")
        for label in sorted({finding.label for finding in study.findings if finding.state == 1}):
            distance, contrast = observe(study, without_finding(study, label), view, options.size, options.input)
            rows.append({"finding": label, "d'": distance, "AUROC": norm.cdf(distance / 2**0.5), "contrast": contrast})
    table = pd.DataFrame(rows).groupby("finding")
    lowest = table[["d'", "AUROC"]].min().add_prefix("lowest ")
    summary = table.mean().join(lowest).assign(n=table.size())
    print(f"{options.size}-pixel films seen at {options.input} pixels; contrast in gray levels of 0 to 255")
    print(summary.round({"d'": 0, "lowest d'": 1, "AUROC": 4, "lowest AUROC": 4, "contrast": 0}).to_string())


def observe(study: Study, other: Study, view: View, size: int, seen: int) -> tuple[float, float]:
    """d' between two studies' films at `seen` pixels, and their largest difference in gray levels."""
    clean = replace(view, noise=0.0)
    films = [_shrunk(render(shown, clean, size)[0], seen) for shown in (study, other)]
    difference = films[0] - films[1]
    # Grain as `phantom.images` adds it; shrinking averages (size / seen)^2 grains into one.
    grain = 255 * view.noise * (0.6 + 0.8 * films[0] / 255) * seen / size
    return float(np.sqrt(np.square(difference / grain).sum())), float(np.abs(difference).max())


def _shrunk(film: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(film.astype(np.float32)).resize((size, size), Image.Resampling.BOX))


if __name__ == "__main__":
    main()
