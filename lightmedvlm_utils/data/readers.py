"""Readers of the data sets as they lie on disk: one raw row per study, and a list of all that was skipped.

Whatever cannot be used is listed with its reason, never dropped without a word; whatever contradicts itself
(a patient in two splits, a study listed twice in a table) stops with a UserError.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lightmedvlm_utils.config import check_dataset
from lightmedvlm_utils.data.annotations import read_r2gen, read_rexrank, rexrank_files
from lightmedvlm_utils.data.mimic import read_mimic
from lightmedvlm_utils.data.openi import read_kaggle, read_openi
from lightmedvlm_utils.errors import UserError


def read_studies(dataset: str, data_root: str | Path = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a data set, in the form in which it lies in `data_root`.

    | dataset | recognised by | form (`raw.attrs["layout"]`) |
    |---|---|---|
    | phantom, mimic | `mimic-cxr-2.0.0-metadata.csv.gz` | MIMIC-CXR-JPG 2.1.0 + reports (folder or zip) |
    | openi | nothing else, or an empty `data_root` | XML: `ecgen-radiology/`, `NLMCXR_reports.tgz`, or the reports |
    | | | inside torchxrayvision (3,955, without images where `data_root` is empty) |
    | openi | `indiana_reports.csv` | Kaggle tables |
    | openi, mimic | `annotation.json` | R2Gen annotation |
    | openi, mimic | `*ReXrank*.json` | ReXrank |

    The official form wins where several are there.

    Returns (raw, skipped). raw, one row a study: subject_id, study_id, split, images (list of {"path",
    "view"}, frontal first), text (the report as written); then the 14 published labels where MIMIC's label
    table is there, or Open-i's sections and MeSH annotations. skipped: study_id, file, reason.
    Raises UserError where the data set is missing, damaged or contradicts itself.
    """
    layout, read, root = _form(dataset, data_root)
    raw, skipped = read(root)
    if raw.empty:
        counts = skipped["reason"].value_counts().head(3)
        reasons = "; ".join(f"{reason}: {count}" for reason, count in counts.items()) or "it is empty"
        raise UserError(f"No usable study in {data_root or 'the Open-i archive'}, read as {layout} ({reasons}).")
    raw.attrs["layout"] = layout
    return raw, skipped


def _form(dataset: str, data_root: str | Path) -> tuple[str, Callable, Path | None]:
    """(name, reader, folder) of the form found."""
    check_dataset(dataset)
    if dataset == "openi" and not str(data_root):
        return "Open-i XML of the torchxrayvision package, without images", read_openi, None
    root = _existing_folder(data_root)
    official = {
        "openi": ("ecgen-radiology", "NLMCXR_reports.tgz"),
        "mimic": ("mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-metadata.csv"),
    }
    if dataset != "phantom" and not any((root / name).exists() for name in official[dataset]):
        if dataset == "openi" and (root / "indiana_reports.csv").is_file():
            return "Kaggle tables of Open-i", read_kaggle, root
        if (root / "annotation.json").is_file():
            return "R2Gen annotation.json", read_r2gen, root
        if rexrank_files(root):
            return "ReXrank JSON", read_rexrank, root
    return ("Open-i XML", read_openi, root) if dataset == "openi" else ("MIMIC-CXR-JPG 2.1.0", read_mimic, root)


def _existing_folder(data_root: str | Path) -> Path:
    root = Path(data_root).expanduser().resolve()
    if not str(data_root) or not root.is_dir():
        raise UserError(f"data_root {str(data_root)!r} is not a folder; set it to the data set's folder.")
    return root
