"""How hard is the phantom? Macro AUROC of logistic regression on tiny images.

A data set is a toy when global pixel templates solve it. This shrinks every frontal film to 16 x 16, fits one
logistic regression per finding on standardized pixels and prints its AUROC on held-out patients; the best of a
few regularization strengths is taken, in the baseline's favor. Run: python benchmarks/phantom_difficulty.py
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence

import numpy as np
from joblib import Parallel, delayed
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from lightmedvlm_utils.observations import FINDINGS
from lightmedvlm_utils.phantom.images import render
from lightmedvlm_utils.phantom.patients import Study, sample_patients, true_states

STRENGTHS = (3e-4, 3e-3, 3e-2)
TINY = 16


def tiny_frontals(images: int, seed: int, size: int, jobs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels `(images, 256)` in 0..1, labels `(images, 13)` 1/0/-1, and the patient of each image."""
    patients = sample_patients(images, seed)
    studies = [study for patient in patients for study in patient.studies][:images]
    pixels = Parallel(n_jobs=jobs)(delayed(_tiny)(study, size) for study in studies)
    labels = [[true_states(study)[label].state for label in FINDINGS] for study in studies]
    return np.stack(pixels), np.array(labels), np.array([study.subject_id for study in studies])


def _tiny(study: Study, size: int) -> np.ndarray:
    image, _ = render(study, study.views[0], size)  # the first view is the frontal one
    small = Image.fromarray(image).resize((TINY, TINY), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() / 255


def linear_auroc(pixels: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> dict[str, float]:
    """Held-out AUROC of each finding; borderline cases are left out. A quarter of the patients is held out."""
    order = {patient: rank for rank, patient in enumerate(dict.fromkeys(patients.tolist()))}
    held_out = np.array([order[patient] % 4 == 3 for patient in patients.tolist()])
    scaled = StandardScaler().fit(pixels[~held_out]).transform(pixels)
    return {label: _best_auroc(scaled, labels[:, k], held_out) for k, label in enumerate(FINDINGS)}


def _best_auroc(pixels: np.ndarray, states: np.ndarray, held_out: np.ndarray) -> float:
    known = states >= 0
    train, test = known & ~held_out, known & held_out
    scores = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=300).fit(pixels[train], states[train])
        scores.append(roc_auc_score(states[test], model.decision_function(pixels[test])))
    return float(max(scores))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256, help="pixels of the rendered films")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    aurocs = linear_auroc(*tiny_frontals(options.images, options.seed, options.size, options.jobs))
    macro = float(np.mean(list(aurocs.values())))
    if options.json:
        print(json.dumps({"macro_auroc": macro, "auroc": aurocs, "images": options.images}))
        return
    for label, value in aurocs.items():
        print(f"{label:28s}{value:.3f}")
    print(f"{'macro AUROC':28s}{macro:.3f}   (logistic regression, {TINY} x {TINY}, {options.images} images)")


if __name__ == "__main__":
    main()
