"""What the readers of all data sets share: skipping with a reason, decoding text, collecting image files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

MAX_REPORT_BYTES = 1 << 20  # the longest real report is under 20 kB; more is damage or a decompression bomb
_VIEW_ORDER = {"PA": 0, "AP": 1}


class SkipFile(Exception):
    """A file that cannot be used; the message is the reason that goes into the `skipped` table."""


def skipped_table(skipped: list[tuple]) -> pd.DataFrame:
    """DataFrame of (study_id or None, file, reason)."""
    return pd.DataFrame(skipped, columns=["study_id", "file", "reason"])


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


def usable_images(candidates: list[tuple[Path, str, str]], study_id: int, skipped: list) -> list[dict]:
    """The images that are there, frontal first (PA, AP, others), as {"path", "view"}.

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
    return sorted(images, key=lambda image: (_VIEW_ORDER.get(image["view"], 2), image["path"]))
