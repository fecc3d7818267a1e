"""Readers of the two JSON forms in which others pass prepared data on: R2Gen's annotation.json and ReXrank's.

Both hold text that someone has already cut out of the reports, so there is less to clean and less to check: prefer
the official files where you have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pandas as pd

from lightmedvlm_utils.data.sources import SPLITS, refuse_two, skipped_table, usable_images
from lightmedvlm_utils.errors import UserError

_COLUMNS = ["subject_id", "study_id", "split", "images", "text"]
SPLIT_NAMES = {"val": "validate", "valid": "validate"} | {name: name for name in SPLITS}
VIEWS = {
    "postero-anterior": "PA",
    "antero-posterior": "AP",
    "frontal": "FRONTAL",
    "left lateral": "LATERAL",
    "lateral": "LATERAL",
}
_IMAGE_FOLDERS = ("images", "files", ".")  # where the forms' users keep the images, below data_root


def rexrank_files(root: Path) -> list[Path]:
    """The ReXrank files in a folder: `ReXRank_MIMICCXR_test.json` and the like."""
    return sorted(path for path in root.glob("*.json") if "rexrank" in path.name.lower())


def read_r2gen(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(raw, skipped) from `annotation.json`: {"train" | "val" | "test": [{"id", "report", "image_path": [...]}]}.

    MIMIC-CXR comes with an entry per image (with study_id and subject_id, or these in the path), IU X-ray with an
    entry per study (`CXR2384_IM-0942`). Views are unknown, texts are what their authors kept of the report.
    """
    path = root / "annotation.json"
    content = _load(path)

    def entries() -> Iterator[dict]:
        for split, items in content.items():
            if split not in SPLIT_NAMES or not isinstance(items, list):
                raise UserError(f"{path} has a part {split!r}; expected lists named train, val and test.")
            for item in items:
                item = item if isinstance(item, dict) else {}
                yield {
                    "name": str(item.get("id", "?")),
                    "split": SPLIT_NAMES[split],
                    "study": item.get("study_id"),
                    "subject": item.get("subject_id"),
                    "paths": item.get("image_path"),
                    "views": [],
                    "text": item.get("report"),
                }

    return _collect(root, path, entries)


def read_rexrank(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(raw, skipped) from ReXrank's files: {study: {"image_path", "frontal_lateral", "context",
    "section_findings", "section_impression", "split", "subject_id" (MIMIC-CXR only)}}."""
    files = rexrank_files(root)

    def entries() -> Iterator[dict]:
        for path in files:
            for name, item in _load(path).items():
                item = item if isinstance(item, dict) else {}
                split = str(item.get("split", ""))
                if split not in SPLIT_NAMES:
                    raise UserError(f"{path} names the split {split!r} for {name}; expected {', '.join(SPLIT_NAMES)}.")
                yield {
                    "name": name,
                    "split": SPLIT_NAMES[split],
                    "study": name,
                    "subject": item.get("subject_id"),
                    "paths": item.get("image_path"),
                    "views": [VIEWS.get(str(view).lower(), "") for view in item.get("frontal_lateral") or []],
                    "text": _rexrank_text(item),
                }

    return _collect(root, files[0], entries)


def _load(path: Path) -> dict:
    def unique(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):  # json itself would keep the last one without a word
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path} lists {repeated!r} twice in one object; remove one of them.")
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} instead of an object; is it the right file?")
    return content


def _rexrank_text(item: dict) -> str | None:
    """The sections under headings again; the context holds "Age:...Gender:...Indication: ...Comparison: ..."."""
    context = str(item.get("context") or "")
    indication = re.search(r"Indication:\s*(.*?)\s*(?=Comparison:|\Z)", context, re.DOTALL)
    parts = {
        "INDICATION": indication[1] if indication else "",
        "FINDINGS": item.get("section_findings"),
        "IMPRESSION": item.get("section_impression"),
    }
    # A missing section is NaN in the files.
    texts = [f"{name}: {text}" for name, text in parts.items() if isinstance(text, str) and text.strip()]
    return "\n\n".join(texts) or None


def _collect(root: Path, path: Path, entries: Callable[[], Iterator[dict]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Group the entries of a file into studies, find their images, and list what is unusable."""
    studies: dict[int, dict] = {}
    skipped: list[tuple] = []
    for entry in entries():
        subject, study = _identity(entry)
        paths = entry["paths"] if isinstance(entry["paths"], list) else []
        if study is None:
            skipped.append((None, entry["name"], "no study id"))
        elif not isinstance(entry["text"], str):
            skipped.append((study, entry["name"], "no report text"))
        elif study not in studies:
            studies[study] = entry | {"subject": subject, "paths": list(map(str, paths)), "splits": {entry["split"]}}
        elif not _add_images(studies[study], entry, paths):
            skipped.append((study, entry["name"], "study is listed again with another report or the same images"))
    _refuse_shared_patients(studies, path)
    rows = []
    for study in sorted(studies):
        images = usable_images(_candidates(root, study, studies[study], skipped), study, skipped)
        if images:
            entry = studies[study]
            rows.append((entry["subject"], study, entry["split"], images, entry["text"]))
        else:
            skipped.append((study, studies[study]["name"], "no image of the study is left"))
    return pd.DataFrame(rows, columns=_COLUMNS), skipped_table(skipped)


def _identity(entry: dict) -> tuple[int | None, int | None]:
    """(subject, study): as given, else from MIMIC-CXR's path, else IU X-ray's number for both."""
    first = next(iter(entry["paths"] or [""]), "") if isinstance(entry["paths"], list) else ""
    in_path = re.search(r"\bp(\d{8})/s(\d{8})\b", str(first))
    number = re.fullmatch(r"s?(\d+)|CXR(\d+)(?:_.*)?", str(entry["study"] or entry["name"]))
    study = int(number[1] or number[2]) if number else int(in_path[2]) if in_path else None
    subject = str(entry["subject"] or "").lstrip("p")
    if subject.isdigit():
        return int(subject), study
    return (int(in_path[1]) if in_path else study), study


def _add_images(study: dict, entry: dict, paths: list) -> bool:
    """Add the images of another entry of a study; False where it is no such entry but a contradiction."""
    study["splits"].add(entry["split"])
    if entry["text"] != study["text"] or set(map(str, paths)) & set(study["paths"]):
        return False
    study["paths"] += map(str, paths)
    study["views"] += entry["views"]
    return True


def _refuse_shared_patients(studies: dict[int, dict], path: Path) -> None:
    pairs = [(study["subject"], split) for study in studies.values() for split in study["splits"]]
    refuse_two(pd.DataFrame(pairs, columns=["subject", "split"]), "subject", "split", f"{path}: patient",
               "is in two splits")  # fmt: skip


def _candidates(root: Path, study: int, entry: dict, skipped: list) -> Iterator[tuple[Path, str, str]]:
    """(path, view, name) of every image; a path that leaves the data set's folder is listed, not followed."""
    views = entry["views"] if len(entry["views"]) == len(entry["paths"]) else [""] * len(entry["paths"])
    for name, view in zip(entry["paths"], views, strict=True):
        relative = PurePosixPath(name.lstrip("/"))  # ReXrank's paths begin with a slash
        if ".." in relative.parts:
            skipped.append((study, name, "image path leaves the folder"))
            continue
        places = [root / folder / relative for folder in _IMAGE_FOLDERS]
        yield next((place for place in places if place.is_file()), places[0]), view, name
