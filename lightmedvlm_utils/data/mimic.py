"""Reader of MIMIC-CXR-JPG 2.1.0 with its reports beside it; the phantom is written in the same layout."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from lightmedvlm_utils.config import LABELS
from lightmedvlm_utils.data.sources import (
    MAX_REPORT_BYTES,
    SkipFile,
    decode_report,
    file_bytes,
    skipped_table,
    usable_images,
)
from lightmedvlm_utils.errors import UserError

SPLITS = ("train", "validate", "test")
_KEYS = ["dicom_id", "study_id", "subject_id"]


def read_mimic(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(raw, skipped) as `readers.read_studies` describes them.

    Needs the metadata and split tables and the reports (`files/**/s*.txt`, `mimic-cxr-reports/files/**` or
    `mimic-cxr-reports.zip`); the CheXpert table is optional.
    """
    metadata = read_table(root, "mimic-cxr-2.0.0-metadata", [*_KEYS, "ViewPosition"])
    split = read_table(root, "mimic-cxr-2.0.0-split", [*_KEYS, "split"])
    images = _merge_split(metadata, split, root)
    read_report = _report_source(root)
    rows, skipped = [], []
    for study_id, views in images.groupby("study_id", sort=True):
        row = _read_study(root, int(study_id), views, read_report, skipped)
        if row is not None:
            rows.append(row)
    raw = pd.DataFrame(rows, columns=["subject_id", "study_id", "split", "images", "text"])
    if _table_path(root, "mimic-cxr-2.0.0-chexpert") is not None:
        raw = raw.join(_published_labels(root), on="study_id")
    return raw, skipped_table(skipped)


def read_table(root: Path, stem: str, columns: Iterable[str]) -> pd.DataFrame:
    """Read `<stem>.csv.gz` (or `.csv`) in `root`; UserError if it is missing, damaged or lacks a column."""
    path = _table_path(root, stem)
    if path is None:
        raise UserError(f"{root / stem}.csv.gz is missing; data_root must be the folder with it and files/.")
    try:
        frame = pd.read_csv(path, low_memory=False)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: parser errors, wrong encodings
        raise UserError(f"{path} cannot be read ({error}); download it again.") from error
    missing = [column for column in columns if column not in frame]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; is it the right table?")
    return frame


def _table_path(root: Path, stem: str) -> Path | None:
    return next((path for path in (root / f"{stem}.csv.gz", root / f"{stem}.csv") if path.is_file()), None)


def _published_labels(root: Path) -> pd.DataFrame:
    """The CheXpert table, indexed by study, its columns in our order."""
    stem = "mimic-cxr-2.0.0-chexpert"
    frame = read_table(root, stem, ["study_id", *LABELS])
    _refuse_duplicates(frame, "study_id", _table_path(root, stem))
    return frame.set_index("study_id")[list(LABELS)].astype(float)


def _merge_split(metadata: pd.DataFrame, split: pd.DataFrame, root: Path) -> pd.DataFrame:
    """One row per image with its split, after the checks that keep patients apart."""
    where = _table_path(root, "mimic-cxr-2.0.0-split")
    _refuse_duplicates(metadata, "dicom_id", _table_path(root, "mimic-cxr-2.0.0-metadata"))
    _refuse_duplicates(split, "dicom_id", where)
    unknown = sorted(map(str, set(split["split"]) - set(SPLITS)))
    if unknown:
        raise UserError(f"{where} names the split {unknown[0]!r}; expected {', '.join(SPLITS)}.")
    images = metadata.merge(split[["dicom_id", "split"]], on="dicom_id", how="left")
    unassigned = int(images["split"].isna().sum())
    if unassigned:
        raise UserError(f"{where} gives no split to {unassigned} images of the metadata; use one release.")
    _refuse_two(images, "subject_id", "split", f"{where}: patient", "is in two splits")
    _refuse_two(images, "study_id", "subject_id", f"{root}: study", "belongs to two patients")
    return images


def _refuse_duplicates(frame: pd.DataFrame, column: str, path: Path) -> None:
    repeated = frame.loc[frame[column].duplicated(), column]
    if len(repeated):
        raise UserError(f"{path} lists {column} {repeated.iloc[0]} more than once ({len(repeated)} repeats).")


def _refuse_two(frame: pd.DataFrame, key: str, value: str, what: str, problem: str) -> None:
    counts = frame.groupby(key)[value].nunique()
    if (counts > 1).any():
        raise UserError(f"{what} {counts.index[counts > 1][0]} {problem} ({int((counts > 1).sum())} such).")


def _report_source(root: Path) -> Callable[[str], bytes]:
    """A function: report path (`files/p10/p10000032/s50414267.txt`) -> its bytes, KeyError if absent."""
    path = root / "mimic-cxr-reports.zip"
    if not path.is_file():
        folder = root / "mimic-cxr-reports" if (root / "mimic-cxr-reports").is_dir() else root
        return lambda name: file_bytes(folder / name)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is not a readable zip file ({error}); download it again.") from error

    def read(name: str) -> bytes:
        if archive.getinfo(name).file_size > MAX_REPORT_BYTES:  # look before inflating
            raise SkipFile("report larger than 1 MB")
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, OSError) as error:
            raise SkipFile(f"damaged in {path.name}") from error

    return read


def _read_study(root: Path, study_id: int, views: pd.DataFrame, read_report: Callable, skipped: list):
    """The raw row of one study, or None after its reason went into `skipped`."""
    subject = int(views["subject_id"].iloc[0])
    patient = f"files/p{str(subject)[:2]}/p{subject}"
    report = f"{patient}/s{study_id}.txt"
    try:
        text = decode_report(read_report(report))
    except KeyError:
        skipped.append((study_id, report, "report is missing"))
        return None
    except SkipFile as error:
        skipped.append((study_id, report, str(error)))
        return None
    positions = views["ViewPosition"].fillna("")
    names = [f"{patient}/s{study_id}/{dicom_id}.jpg" for dicom_id in views["dicom_id"]]
    candidates = [(root / name, view, name) for name, view in zip(names, positions, strict=True)]
    images = usable_images(candidates, study_id, skipped)
    if not images:
        skipped.append((study_id, f"{patient}/s{study_id}", "no image of the study is left"))
        return None
    return subject, study_id, views["split"].iloc[0], images, text
