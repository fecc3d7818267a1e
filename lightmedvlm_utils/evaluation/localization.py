"""Do attention maps find the findings? Pointing game and attention mass against the phantoms' true masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.images import enlarge
from lightmedvlm_utils.evaluation.bootstrap import bootstrap_weights, records


def localize(attention: np.ndarray, mask: np.ndarray) -> tuple[bool, float]:
    """Does a map find a finding? `attention (h, w) >= 0`, enlarged to the boolean `mask (H, W)`.

    Returns (pointing game: the peak lies inside the mask; share of the map's mass inside the mask). Raises
    ValueError for a map that is zero everywhere.
    """
    enlarged = enlarge(attention, mask.shape)
    if enlarged.sum() <= 0:
        raise ValueError("The attention map is zero everywhere.")
    peak = np.unravel_index(enlarged.argmax(), mask.shape)
    return bool(mask[peak]), float(enlarged[mask].sum() / enlarged.sum())


def center_map(side: int = 64) -> np.ndarray:
    """The blind guess: a Gaussian in the middle of the image, its sigma a quarter of the side."""
    steps = np.linspace(-2, 2, side)
    return np.exp(-(steps[:, None] ** 2 + steps[None] ** 2) / 2)


def mean_masks(masks: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Where each finding usually is: the mean of its masks, label -> (h, w). Of training images, this is the strongest
    guess without looking."""
    total: dict[str, np.ndarray] = {}
    for shown in masks:
        for label, mask in shown.items():
            total[label] = total.get(label, 0.0) + mask.astype(float)
    return {label: summed / summed.max() for label, summed in total.items()}


def localization_table(
    maps: Sequence[dict[str, np.ndarray]],
    masks: Sequence[dict[str, np.ndarray]],
    patients: Sequence,
    other: Sequence[int],
    system: str,
    usual: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """One row per image, finding shown in it, and system: `pointing_game` and `inside_mass`.

    `maps` and `masks` hold one `{label: array}` per image; `other[i]` is the index of another patient's one.
    Systems: `system`, whose maps they are; "shuffled_image", the same label's map of that other image; "mean_mask",
    the label's `usual` place (`mean_masks` of the training images; the center where it has none); "center"; "uniform",
    whose two numbers are both the mask's share of the image.
    """
    blind, rows = center_map(), []
    for index, shown in enumerate(masks):
        for label, mask in shown.items():
            scores = {
                system: localize(maps[index][label], mask),
                "shuffled_image": localize(maps[other[index]][label], mask),
                "mean_mask": localize(usual.get(label, blind), mask),
                "center": localize(blind, mask),
                "uniform": (mask.mean(), mask.mean()),
            }
            about = {"subject_id": patients[index], "image": index, "label": label}
            rows += [
                about | {"system": name, "pointing_game": float(hit), "inside_mass": float(inside)}
                for name, (hit, inside) in scores.items()
            ]
    return pd.DataFrame(rows, columns=["subject_id", "image", "label", "system", "pointing_game", "inside_mass"])


def localization_records(table: pd.DataFrame, samples: int = 1000, seed: int = 0) -> list[dict]:
    """Records of a `localization_table`: means over all shown findings and by label, resampled by patient."""
    rows = []
    for system, own in table.groupby("system", sort=False):
        for label in ("all findings", *sorted(own["label"].unique())):
            part = own if label == "all findings" else own[own["label"] == label]
            weights = bootstrap_weights(part["subject_id"], samples, seed)
            scores = {
                metric: weights @ part[metric].to_numpy() / weights.sum(1)
                for metric in ("pointing_game", "inside_mass")
            }
            about = {"task": "localization", "unit": "finding in image", "section": label}
            rows += records(scores, system=system, n=len(part), **about)
    return rows
