"""The study table on disk: one row a study, the paths of its images relative to the data set's root.

So neither a moved data set nor a moved clone makes a table wrong.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lightmedvlm_utils.files import write_parquet


def write_study_table(studies: pd.DataFrame, path: Path, root: Path | str | None) -> Path:
    """Write a table with a column `images` (lists of {"path", "view"}); paths outside `root` stay as they are."""
    base = Path(root).resolve() if root else None

    def relative(image: dict) -> dict:
        inside = base is not None and Path(image["path"]).is_relative_to(base)
        return {**image, "path": Path(image["path"]).relative_to(base).as_posix()} if base and inside else image

    images = [[relative(image) for image in of_study] for of_study in studies["images"]]
    return write_parquet(studies.assign(images=pd.Series(images, index=studies.index, dtype=object)), path)


def read_study_table(path: Path, root: Path | str | None) -> pd.DataFrame:
    """The table with the paths of its images made absolute."""
    studies = pd.read_parquet(path)
    base = Path(root).resolve() if root else Path()
    images = [[{**image, "path": str(base / image["path"])} for image in of_study] for of_study in studies["images"]]
    return studies.assign(images=pd.Series(images, index=studies.index, dtype=object))
