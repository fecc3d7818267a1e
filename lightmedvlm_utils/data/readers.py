"""Readers of the data sets as they lie on disk: one raw row per study, and a list of all that was skipped.

Whatever cannot be used is listed with its reason, never dropped without a word; whatever contradicts itself
(a patient in two splits, a study listed twice in a table) stops with a UserError.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lightmedvlm_utils.config import check_dataset
from lightmedvlm_utils.data.annotations import read_r2gen, read_rexrank
from lightmedvlm_utils.data.mimic import read_mimic
from lightmedvlm_utils.data.openi import read_kaggle, read_openi
from lightmedvlm_utils.data.sources import refiled_reports
from lightmedvlm_utils.errors import UserError


class Form(NamedTuple):
    """One form in which a data set is published."""

    files: tuple[str, ...]  # glob patterns of the files that it is recognized by, any of them
    title: str
    read: Callable[..., tuple[pd.DataFrame, pd.DataFrame]]  # of the folder, None for the package
    packaged: bool = False  # whether an installed package has it too


_MIMIC = Form(("mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-metadata.csv"), "MIMIC-CXR-JPG 2.1.0", read_mimic)
_R2GEN = Form(("annotation.json",), "R2Gen annotation.json", read_r2gen)
_REXRANK = Form(("*[Rr][Ee][Xx][Rr][Aa][Nn][Kk]*.json",), "ReXrank JSON", read_rexrank)
# The forms of each data set, the official one first: it wins where several are there, and says what is missing where
# none is.
FORMS: dict[str, tuple[Form, ...]] = {
    "phantom": (_MIMIC,),
    "mimic": (_MIMIC, _R2GEN, _REXRANK),
    "openi": (
        Form(("ecgen-radiology", "NLMCXR_reports.tgz"), "Open-i XML", read_openi, packaged=True),
        Form(("indiana_reports.csv",), "Kaggle tables of Open-i", read_kaggle),
        _R2GEN,
        _REXRANK,
    ),
}


def read_studies(dataset: str, data_root: str | Path = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a data set, in the form in which it lies in `data_root` (FORMS; recognized by its files).

    Open-i's 3,955 reports also come inside torchxrayvision: an empty `data_root` reads those, without images.

    Returns (raw, skipped). raw, one row a study: subject_id, study_id, split, images (list of {"path",
    "view"}, frontal first), text (the report as written), date (Timestamp of the study; NaT where it is unknown: of
    the forms only MIMIC-CXR-JPG has dates, shifted as published), refiled (whether it holds the text of an earlier
    study of the patient, see `sources.refiled_reports`); the 14 published labels where MIMIC's label table is there, or
    Open-i's sections and MeSH annotations; the form in `raw.attrs["layout"]`. skipped: study_id, file, reason. Raises
    UserError where the data set is missing, damaged or contradicts itself.
    """
    form, root = _form(dataset, data_root)
    raw, skipped = form.read(root)
    if raw.empty:
        counts = skipped["reason"].value_counts().head(3)
        reasons = "; ".join(f"{reason}: {count}" for reason, count in counts.items()) or "it is empty"
        raise UserError(f"No usable study in {data_root or 'the package'}, read as {form.title} ({reasons}).")
    if "date" not in raw:
        raw["date"] = pd.Series(pd.NaT, index=raw.index, dtype="datetime64[ns]")
        raw["refiled"] = refiled_reports(raw)
    raw.attrs["layout"] = form.title
    return raw, skipped


def _form(dataset: str, data_root: str | Path) -> tuple[Form, Path | None]:
    """The form found, and its folder."""
    check_dataset(dataset)
    forms = FORMS[dataset]
    if forms[0].packaged and not str(data_root):
        return forms[0]._replace(title=f"{forms[0].title} of an installed package, without images"), None
    root = _existing_folder(data_root)
    found = (form for form in forms if any(next(root.glob(name), None) for name in form.files))
    return next(found, forms[0]), root


def _existing_folder(data_root: str | Path) -> Path:
    root = Path(data_root).expanduser().resolve()
    if not str(data_root) or not root.is_dir():
        raise UserError(f"data_root {str(data_root)!r} is not a folder; set it to the data set's folder.")
    return root
