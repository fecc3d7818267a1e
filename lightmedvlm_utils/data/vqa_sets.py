"""Published VQA data sets in the project's form: a study table, a table of questions, and a list of all left out."""

from __future__ import annotations

import gc
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.sources import SPLITS
from lightmedvlm_utils.data.vqa_forms import (
    read_medical_diff,
    read_mimic_cxr_vqa,
    read_slake,
    read_vqa_rad,
    read_vqa_rad_halves,
)
from lightmedvlm_utils.errors import UserError


class VQASet(NamedTuple):
    """A VQA data set as `read_vqa` gives it."""

    name: str  # vqa-rad, slake, mimic-cxr-vqa or medical-diff-vqa
    title: str
    studies: pd.DataFrame
    questions: pd.DataFrame
    skipped: pd.DataFrame
    shared: int  # patients (images where patients are not known) with questions in two splits


class VQAForm(NamedTuple):
    """One form in which a VQA data set is published."""

    name: str
    title: str
    files: tuple[str, ...]  # glob patterns of the files that it is recognized by, any of them
    read: Callable[[Path], pd.DataFrame]  # of the folder that holds such a file; rows as vqa_forms.COLUMNS
    folders: tuple[str, ...]  # where images lie below the folder of the images
    unit: str = "image"  # what may be in one split only


_RAD_FOLDERS = ("VQA_RAD Image Folder", "images", "")
_MIMIC_FOLDERS = ("files", "")  # of the data set, or of its images
FORMS = (
    VQAForm("vqa-rad", "VQA-RAD", ("VQA_RAD Dataset*.json",), read_vqa_rad, _RAD_FOLDERS),
    VQAForm("vqa-rad", "VQA-RAD in two files", ("trainset.json", "testset.json"), read_vqa_rad_halves, _RAD_FOLDERS),
    VQAForm("slake", "SLAKE", ("validation.json", "validate.json", "imgs"), read_slake, ("imgs", "")),
    VQAForm(
        "mimic-cxr-vqa",
        "MIMIC-Ext-MIMIC-CXR-VQA",
        tuple(
            f"{folder}{name}" for folder in ("", "dataset/", "*/dataset/") for name in ("ans2idx.json", "valid.json")
        ),
        read_mimic_cxr_vqa,
        _MIMIC_FOLDERS,
        "patient",
    ),
    VQAForm(
        "medical-diff-vqa",
        "Medical-Diff-VQA",
        ("mimic_pair_questions.csv",),
        read_medical_diff,
        _MIMIC_FOLDERS,
        "patient",
    ),
)

STUDY_COLUMNS = ["subject_id", "study_id", "split", "images"]
QUESTION_COLUMNS = [
    *("study_id", "kind", "label", "question", "answer", "closed", "split", "source_id", "content"),
]
_RANK = {split: rank for rank, split in enumerate(SPLITS)}  # from training to testing
_REASONS = ["study_id", "source_id", "file", "reason"]


def read_vqa(
    root: str | Path,
    image_root: str | Path = "",
    *,
    chest_only: bool = True,
    published_split: bool = False,
    differences: bool = False,
) -> VQASet:
    """Read a VQA data set, in the form that lies in `root` (FORMS; recognized by its files).

    `image_root`: the folder of the images, for the sets about MIMIC-CXR that of MIMIC-CXR-JPG; "" for `root`. Images
    are looked for, not opened. `chest_only`: of VQA-RAD and SLAKE chest X-rays alone. `differences`: keep
    Medical-Diff-VQA's questions about two studies; `questions` has reference_id then, and `studies` those studies too.

    No image, nor patient where patients are known, is in two splits: of such, the questions of the split that is
    nearer to training are left out; VQA-RAD, which was published without this, has a split of ours
    (`vqa_forms.vqa_rad_split`). `published_split` keeps every set as published and counts them in `shared`; the split
    of a question is then that in `questions`, and `studies` has the one nearer to testing.

    studies, one row a study (VQA-RAD, SLAKE: an image), sorted: subject_id, study_id (of the set; of VQA-RAD and SLAKE
    the number in the image's name, for both), split, images (list of {"path", "view"}). questions, sorted by
    study: study_id, kind (presence, side, zone, severity, view, device, normality, count or the set's own: tables in
    `vqa_kinds`), label (of the sets about MIMIC-CXR the one label that the question is about, perhaps at one place
    only; else ""), question, answer (`vqa_kinds.normalized`; lists sorted, "none" for an empty one), closed (answered
    by yes or no), split, source_id (the set's number; MIMIC-CXR-VQA begins anew in each split), content (the set's own
    type). skipped: study_id, source_id, file, reason; every question of the files is in one of the two tables. The
    order of the files' rows does not matter.

    Raises UserError where `root` holds no such set, a file is damaged or contradicts itself, or nothing can be used.
    """
    form, folder = find_vqa(root)
    images = _folder(image_root, "its images") if str(image_root) else Path(root).expanduser().resolve()
    with _garbage_left_alone():
        rows = form.read(folder)
    if published_split:
        rows["split"] = rows["published"]
    if chest_only:
        _mark(rows, ~rows["chest"], "image is not a chest X-ray")
    if not differences:
        _mark(rows, rows["kind"] == "difference", "question compares two studies")
    _mark(rows, rows["study_id"].isna() | rows["subject_id"].isna() | (rows["image"] == ""), "no study or image named")
    _mark(rows, rows["question"] == "", "no question")
    _mark(rows, rows["answer"] == "", "no answer")
    rows = _sorted(rows)
    paths = _mark_images(rows, [os.path.join(images, folder) for folder in form.folders])
    shared = _mark_shared(rows, form.unit, keep=published_split)
    _mark_repeats(rows)
    usable = rows[rows["reason"] == ""]
    if usable.empty:
        counts = rows["reason"].value_counts().head(3)
        reasons = "; ".join(f"{reason}: {count}" for reason, count in counts.items()) or "it is empty"
        raise UserError(f"No usable question in {root}, read as {form.title}, with images in {images} ({reasons}).")
    return VQASet(form.name, form.title, *_tables(rows, usable, paths, differences), shared)


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """JSON makes millions of objects and no garbage; looking for some among them takes several times as long."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _folder(path: str | Path, what: str) -> Path:
    folder = Path(path).expanduser().resolve()
    if not str(path) or not folder.is_dir():
        raise UserError(f"{str(path)!r} is not a folder; give the folder of {what}.")
    return folder


def find_vqa(folder: str | Path) -> tuple[VQAForm, Path]:
    """The form of the VQA data set in a folder, the official one first, and the folder that holds its files.

    Raises UserError where there is none, or more than one.
    """
    root = _folder(folder, "the VQA data set")
    found: dict[str, tuple[VQAForm, Path]] = {}
    for form in FORMS:
        path = next((path for pattern in form.files for path in root.glob(pattern)), None)
        if path is not None:
            found.setdefault(form.name, (form, path.parent))
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise UserError(f"{root} holds {' and '.join(found)}; give a folder with one VQA data set.")
    looked = "; ".join(f"{form.title}: {', '.join(form.files)}" for form in FORMS)
    raise UserError(f"{root} holds no known VQA data set (looked for {looked}).")


def _mark(rows: pd.DataFrame, where: pd.Series, reason: str) -> None:
    """Give rows that have none yet a reason to be left out."""
    rows.loc[where & (rows["reason"] == ""), "reason"] = reason


def _sorted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows from the test split to the training split, so that nothing depends on their order in the files."""
    ties = rows.duplicated(["source_id", "file"], keep=False)  # never in whole files
    keys = {
        "rank": -rows["split"].map(_RANK),
        "number": pd.to_numeric(rows["source_id"], errors="coerce"),
        "name": rows["source_id"],
        "file": rows["file"],
        "tie": rows["question"].where(ties, "") + rows["answer"].where(ties, ""),
    }
    order = pd.DataFrame(keys, index=rows.index).sort_values(list(keys)).index
    return rows.loc[order].reset_index(drop=True)


def _mark_images(rows: pd.DataFrame, folders: Sequence[str]) -> dict[str, str]:
    """Leave out questions whose image cannot be used; the path of every image that can, by its name."""
    paths: dict[str, str] = {}
    for column, what in (("image", "image"), ("reference_image", "image of the earlier study")):
        asked = rows.loc[(rows["reason"] == "") & ((rows["kind"] == "difference") | (column == "image")), column]
        codes, names = pd.factorize(asked)
        found = [_find_image(name, folders) for name in names]
        problems = np.array([f"{what} {problem}" if problem else "" for _, problem in found], dtype=object)
        rows.loc[asked.index, "reason"] = problems[codes]
        paths |= {name: path for name, (path, problem) in zip(names, found, strict=True) if not problem}
    # A study's questions are about one image of it; were it two, nobody could say which one is meant.
    usable = rows.loc[rows["reason"] == "", ["study_id", "image"]]
    other = usable.drop_duplicates().sort_values("image")
    other = other[other["study_id"].duplicated()]
    if len(other):
        asked = usable.reset_index().merge(other, on=["study_id", "image"])["index"]
        rows.loc[asked, "reason"] = "question is about another image of the study"
    return paths


def _find_image(name: str, folders: Sequence[str]) -> tuple[str, str]:
    """(path, "") of an image, or ("", what is wrong with it)."""
    if not name:
        return "", "is not known"
    relative = name.replace("\\", "/")
    if os.path.isabs(relative) or ".." in relative.split("/"):
        return "", "path leaves the folder"
    for folder in folders:
        path = os.path.join(folder, relative)
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            continue
        if stat.S_ISREG(found.st_mode):
            return (path, "") if found.st_size else ("", "file is empty")
    return "", "is missing"


def _mark_shared(rows: pd.DataFrame, unit: str, keep: bool) -> int:
    """How many patients (`subject_id`) are left in two splits; leave the nearer to training out unless `keep`."""
    usable = rows[rows["reason"] == ""]
    rank = usable["split"].map(_RANK)
    last = rank.groupby(usable["subject_id"]).transform("max")
    early = rank < last
    if keep:
        return usable.loc[early, "subject_id"].nunique()
    rows.loc[usable.index[early], "reason"] = [f"{unit} is in the {SPLITS[rank]} split too" for rank in last[early]]
    return 0


def _mark_repeats(rows: pd.DataFrame) -> None:
    """Leave out what is asked twice about an image, and what is answered twice; `rows` begin with the test split."""
    keys = rows.loc[rows["reason"] == "", ["study_id", "reference_id", "split", "question", "answer"]]
    keys["asked"] = [question.lower().rstrip(" ?.!") for question in keys["question"].tolist()]
    one = ["study_id", "reference_id", "asked"]
    repeated = keys.duplicated([*one, "answer"])
    rows.loc[keys.index[repeated], "reason"] = "question is asked twice of the image"
    keys = keys[~repeated]
    disputed = keys.duplicated([*one, "split"], keep=False)
    rows.loc[keys.index[disputed], "reason"] = "question has different answers for the image"


def _tables(
    rows: pd.DataFrame, usable: pd.DataFrame, paths: dict[str, str], differences: bool
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(studies, questions, skipped) as `read_vqa` describes them."""
    columns = ["subject_id", "study_id", "split", "image", "view"]
    compared = usable[usable["kind"] == "difference"]
    earlier = compared.assign(study_id=compared["reference_id"], image=compared["reference_image"], view="")
    # Rows begin with the test split: of a study in two, the row that is nearest to testing stays.
    both = pd.concat([table[columns].drop_duplicates("study_id") for table in (usable, earlier)])
    both = both.assign(rank=-both["split"].map(_RANK)).sort_values(["study_id", "rank"])
    studies = both.drop_duplicates("study_id").drop(columns="rank")
    pairs = zip(studies["image"], studies["view"], strict=True)
    studies["images"] = [[{"path": paths[image], "view": view}] for image, view in pairs]
    columns = [*QUESTION_COLUMNS, "reference_id"] if differences else QUESTION_COLUMNS
    questions = usable.assign(closed=usable["answer"].isin(["yes", "no"]))[columns].astype({"study_id": "int64"})
    skipped = rows.loc[rows["reason"] != "", _REASONS]
    return (
        studies[STUDY_COLUMNS].astype({"subject_id": "int64", "study_id": "int64"}).reset_index(drop=True),
        questions.sort_values("study_id", kind="stable", ignore_index=True).infer_objects(),
        skipped.reset_index(drop=True).infer_objects(),
    )
