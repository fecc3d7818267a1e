"""Readers of the data sets as they lie on disk: one raw row per study, and a list of all that was skipped.

Whatever cannot be used is listed with its reason, never dropped without a word; whatever contradicts itself
(a patient in two splits, a study listed twice in a table) stops with a UserError.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lightmedvlm_utils.data.mimic import read_mimic
from lightmedvlm_utils.data.openi import read_openi
from lightmedvlm_utils.errors import UserError


def read_studies(dataset: str, data_root: str | Path = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a data set.

    `dataset`: "phantom" or "mimic" (one layout: MIMIC-CXR-JPG 2.1.0 + reports) or "openi" (with an empty
    `data_root`: the 3,955 reports inside torchxrayvision, without images).

    Returns (raw, skipped). raw, one row a study: subject_id, study_id, split, images (list of {"path",
    "view"}, frontal first), text (the report as written); then the 14 published labels where MIMIC's label
    table is there, or Open-i's sections and MeSH annotations. skipped: study_id, file, reason.
    Raises UserError where the data set is missing, damaged or contradicts itself.
    """
    if dataset in ("phantom", "mimic"):
        raw, skipped = read_mimic(_existing_folder(data_root))
    elif dataset == "openi":
        raw, skipped = read_openi(_existing_folder(data_root) if str(data_root) else None)
    else:
        raise UserError(f"There is no data set {dataset!r}; choose phantom, openi or mimic.")
    if raw.empty:
        counts = skipped["reason"].value_counts().head(3)
        reasons = "; ".join(f"{reason}: {count}" for reason, count in counts.items()) or "it is empty"
        raise UserError(f"No usable study in {data_root or 'the Open-i archive'} ({reasons}).")
    return raw, skipped


def _existing_folder(data_root: str | Path) -> Path:
    root = Path(data_root).expanduser().resolve()
    if not str(data_root) or not root.is_dir():
        raise UserError(f"data_root {str(data_root)!r} is not a folder; set it to the data set's folder.")
    return root
