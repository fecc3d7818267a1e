"""Reader of MIMIC-CXR-JPG 2.1.0 with its reports beside it; the phantom is written in the same layout."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lightmedvlm_utils.data.sources import (
    MAX_REPORT_BYTES,
    SPLITS,
    SkipFile,
    decode_report,
    file_bytes,
    read_csv,
    refiled_reports,
    refuse_duplicates,
    refuse_two,
    skipped_table,
    usable_images,
)
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS

LABEL_TABLES = {
    "chexpert": "mimic-cxr-2.0.0-chexpert",
    "negbio": "mimic-cxr-2.0.0-negbio",
    "radiologist": "mimic-cxr-2.1.0-test-set-labeled",
}
_KEYS = ["dicom_id", "study_id", "subject_id"]


def read_mimic(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(raw, skipped) as `readers.read_studies` describes them.

    Needs the metadata and split tables and the reports (`files/**/s*.txt`, `mimic-cxr-reports/files/**` or
    `mimic-cxr-reports.zip`); of the label tables, CheXpert's is joined where it is there.
    """
    images = _images_with_split(root)
    read_report = _report_source(root)
    rows: list[dict] = []
    skipped: list[tuple] = []
    for study_id, views in images.groupby("study_id", sort=True):
        row = _read_study(root, int(study_id), views, read_report, skipped)
        if row is not None:
            rows.append(row)
    raw = pd.DataFrame(rows, columns=["subject_id", "study_id", "split", "images", "text"])
    raw["date"] = raw["study_id"].map(_study_dates(images))
    raw["refiled"] = refiled_reports(raw)  # before studies without images go: the copied report may be theirs
    raw = raw[raw["images"].str.len() > 0].reset_index(drop=True)
    published = read_label_tables(root)
    if "chexpert" in published:
        raw = raw.join(published["chexpert"], on="study_id")
    return raw, skipped_table(skipped)


def read_label_tables(root: Path) -> dict[str, pd.DataFrame]:
    """The published label tables that are there, by name: "chexpert" and "negbio" (made by labelers, every study)
    and "radiologist" (read by hand, test studies only; new in 2.1.0).

    Each is indexed by study_id with the 14 labels as columns: 1, 0, -1 or NaN; a label that a table does not have
    is NaN throughout. Raises UserError where a table is damaged or lists a study twice.
    """
    tables = {}
    for name, stem in LABEL_TABLES.items():
        path = _table_path(root, stem)
        if path is None:
            continue
        # The radiologists' table calls Lung Opacity "Airspace Opacity" and has neither subject_id nor, in some
        # copies, No Finding.
        needed = ["study_id"] if name == "radiologist" else ["study_id", *LABELS]
        frame = read_csv(path, needed).rename(columns={"Airspace Opacity": "Lung Opacity"})
        refuse_duplicates(frame, "study_id", path)
        if not set(LABELS) & set(frame):
            raise UserError(f"{path} has no column of the 14 labels; is it the right table?")
        tables[name] = frame.set_index("study_id").reindex(columns=list(LABELS)).astype(float)
    return tables


def patient_folder(subject_id: int) -> str:
    """Where a patient's studies lie below `files/`: `p10/p10000032`."""
    return f"p{str(subject_id)[:2]}/p{subject_id}"


def _read_table(root: Path, stem: str, columns: list[str]) -> tuple[pd.DataFrame, Path]:
    path = _table_path(root, stem) or root / f"{stem}.csv.gz"
    return read_csv(path, columns), path


def _table_path(root: Path, stem: str) -> Path | None:
    return next((path for path in (root / f"{stem}.csv.gz", root / f"{stem}.csv") if path.is_file()), None)


def _images_with_split(root: Path) -> pd.DataFrame:
    """One row per image with its split, after the checks that keep patients apart."""
    metadata, metadata_path = _read_table(root, "mimic-cxr-2.0.0-metadata", [*_KEYS, "ViewPosition"])
    split, split_path = _read_table(root, "mimic-cxr-2.0.0-split", [*_KEYS, "split"])
    refuse_duplicates(metadata, "dicom_id", metadata_path)
    refuse_duplicates(split, "dicom_id", split_path)
    unknown = sorted(map(str, set(split["split"]) - set(SPLITS)))
    if unknown:
        raise UserError(f"{split_path} names the split {unknown[0]!r}; expected {', '.join(SPLITS)}.")
    images = metadata.merge(split[["dicom_id", "split"]], on="dicom_id", how="left")
    unassigned = int(images["split"].isna().sum())
    if unassigned:
        raise UserError(f"{split_path} gives no split to {unassigned} images of the metadata; use one release.")
    refuse_two(images, "subject_id", "split", f"{split_path}: patient", "is in two splits")
    refuse_two(images, "study_id", "subject_id", f"{root}: study", "belongs to two patients")
    return images


def _study_dates(images: pd.DataFrame) -> pd.Series:
    """When each study began, by study_id: the first StudyDate and StudyTime (20801130, 93015.75) of its images.

    NaT where the table has no date that is one; a study without a time counts from midnight.
    """
    unknown = pd.Series(float("nan"), index=images.index)
    days, times = (pd.to_numeric(images.get(column, unknown), errors="coerce") for column in ("StudyDate", "StudyTime"))
    times = times.where(times.between(0, 235_959.999_999)).fillna(0)
    seconds = times // 10_000 * 3600 + times // 100 % 100 * 60 + times % 100
    text = days.map("{:.0f}".format)  # "nan" is no date
    dates = pd.to_datetime(text, format="%Y%m%d", errors="coerce") + pd.to_timedelta(seconds, unit="s")
    return dates.groupby(images["study_id"]).min()


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

    names = set(archive.namelist())

    def read(name: str) -> bytes:
        if name not in names:
            name = f"mimic-cxr-reports/{name}"  # zipped with its folder
        if archive.getinfo(name).file_size > MAX_REPORT_BYTES:  # look before inflating
            raise SkipFile("report larger than 1 MB")
        try:
            return archive.read(name)  # in memory: nothing is unpacked, so nothing can be written outside a folder
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:  # RuntimeError: encrypted
            raise SkipFile(f"damaged in {path.name}") from error

    return read


def _read_study(root: Path, study_id: int, views: pd.DataFrame, read_report: Callable, skipped: list):
    """The raw row of one study, or None where its report cannot be read; what cannot be used went into `skipped`."""
    subject = int(views["subject_id"].iloc[0])
    patient = f"files/{patient_folder(subject)}"
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
    return subject, study_id, views["split"].iloc[0], images, text
