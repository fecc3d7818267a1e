"""What the readers of all data sets share: tables, skipping with a reason, decoding text, collecting image files."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lightmedvlm_utils.errors import UserError

SPLITS = ("train", "validate", "test")
MAX_REPORT_BYTES = 1 << 20  # the longest real report is under 20 kB; more is damage or a decompression bomb
_VIEW_ORDER = {"PA": 0, "AP": 1, "FRONTAL": 2}


class SkipFile(Exception):
    """A file that cannot be used; the message is the reason that goes into the `skipped` table."""


def skipped_table(skipped: list[tuple]) -> pd.DataFrame:
    """DataFrame of (study_id or None, file, reason)."""
    return pd.DataFrame(skipped, columns=["study_id", "file", "reason"])


def read_csv(path: Path, columns: Iterable[str], **options) -> pd.DataFrame:
    """Read a CSV, gzipped or not; UserError if it is missing, damaged or lacks one of `columns`.

    `options` go to `pandas.read_csv`.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; give the folder that holds it.")
    try:
        frame = pd.read_csv(path, low_memory=False, **options)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: parser errors, wrong encodings
        raise UserError(f"{path} cannot be read ({error}); download it again.") from error
    missing = [column for column in columns if column not in frame]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; is it the right table?")
    return frame


def refuse_duplicates(frame: pd.DataFrame, column: str, path: Path) -> None:
    """UserError where a value of `column`, a key of the table in `path`, occurs more than once."""
    repeated = frame.loc[frame[column].duplicated(), column]
    if len(repeated):
        raise UserError(
            f"{path} lists {column} {repeated.iloc[0]} more than once ({len(repeated)} repeats); keep one row of each."
        )


def refuse_two(frame: pd.DataFrame, key: str, value: str, what: str, problem: str) -> None:
    """UserError "<what> <key> <problem>" where one `key` has two different `value`s."""
    counts = frame.groupby(key)[value].nunique()
    if (counts > 1).any():
        several = int((counts > 1).sum())
        raise UserError(f"{what} {counts.index[counts > 1][0]} {problem} ({several} such); use one release unchanged.")


def refiled_reports(raw: pd.DataFrame) -> pd.Series:
    """Which studies hold the text of an earlier study of the same patient: bool, indexed as `raw`.

    Needs subject_id, study_id, text and date. Two studies with one text: it was written for the first, so the images of
    the later one have a wrong report. Later is by `date`; studies without a date follow in the order of study_id, which
    says nothing about time where ids were drawn at random. Empty reports are no copies.
    """
    in_time = raw.assign(text=raw["text"].fillna("").str.strip()).sort_values(["date", "study_id"])
    copies = in_time.duplicated(["subject_id", "text"]) & (in_time["text"] != "")
    return copies.reindex(raw.index)


def file_bytes(path: Path) -> bytes:
    """Content of a report file; KeyError if it is missing (as from an archive), SkipFile if unreadable."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_REPORT_BYTES + 1)
    except FileNotFoundError as error:
        raise KeyError(str(path)) from error
    except OSError as error:
        raise SkipFile(f"report cannot be read: {error.strerror}") from error


def decode_report(data: bytes) -> str:
    """Bytes of a report as text. A wrong encoding is refused: guessing one would corrupt words unseen."""
    if len(data) > MAX_REPORT_BYTES:
        raise SkipFile("report larger than 1 MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkipFile("report is not UTF-8 text") from error


def usable_images(candidates: Iterable[tuple[Path, str, str]], study_id: int, skipped: list) -> list[dict]:
    """The images that are there, frontal first (PA, AP, FRONTAL, others), as {"path", "view"}.

    `candidates`: (path, view, name for the skipped table). Missing and empty files are added to `skipped`.
    """
    images = []
    for path, view, name in candidates:
        if not path.is_file():
            skipped.append((study_id, name, "image is missing"))
        elif path.stat().st_size == 0:
            skipped.append((study_id, name, "image file is empty"))
        else:
            images.append({"path": str(path), "view": view})
    return sorted(images, key=lambda image: (_VIEW_ORDER.get(image["view"], 3), image["path"]))
