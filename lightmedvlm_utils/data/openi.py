"""Reader of Open-i, the Indiana University chest X-rays: XML reports or Kaggle's tables, and PNG images."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import pandas as pd

from lightmedvlm_utils.data.sources import (
    MAX_REPORT_BYTES,
    SkipFile,
    decode_report,
    file_bytes,
    read_csv,
    refuse_duplicates,
    skipped_table,
    usable_images,
)
from lightmedvlm_utils.errors import UserError

SECTIONS = ("comparison", "indication", "findings", "impression")
_COLUMNS = ["subject_id", "study_id", "split", "images", "text", *SECTIONS, "mesh"]
_LATERAL_VIEWS = ("L", "LL", "RL", "LARGE LATERAL")


def read_openi(root: Path | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(raw, skipped) as `readers.read_studies` describes them.

    `root` holds the PNG images at any depth and, optionally, `ecgen-radiology/` or `NLMCXR_reports.tgz`;
    without them, and with root None (text only, `images` empty), the reports are torchxrayvision's own.
    """
    images = None if root is None else _ImageFolder(root)
    rows: list[dict] = []
    skipped: list[tuple] = []
    seen: set[int] = set()
    for name, data in _report_files(root, skipped):
        try:
            record, image_ids = parse_report(data)
        except SkipFile as error:
            skipped.append((None, name, str(error)))
            continue
        study_id = record["study_id"]
        if study_id in seen:
            skipped.append((study_id, name, "study id already read from another file"))
            continue
        seen.add(study_id)
        if images is not None:
            record["images"] = usable_images(images.candidates(image_ids), study_id, skipped)
            if not record["images"]:
                skipped.append((study_id, name, "no image of the study is left"))
                continue
        rows.append(record)
    raw = pd.DataFrame(rows, columns=_COLUMNS).sort_values("study_id", ignore_index=True)
    return raw, skipped_table(skipped)


def read_kaggle(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(raw, skipped) of the form on Kaggle: `indiana_reports.csv`, `indiana_projections.csv`, PNGs at any depth."""
    reports = read_csv(root / "indiana_reports.csv", ["uid", "MeSH", *SECTIONS])
    projections = read_csv(root / "indiana_projections.csv", ["uid", "filename", "projection"])
    refuse_duplicates(reports, "uid", root / "indiana_reports.csv")
    refuse_duplicates(projections, "filename", root / "indiana_projections.csv")
    images = _ImageFolder(root)
    views = {uid: list(zip(v["filename"], v["projection"], strict=True)) for uid, v in projections.groupby("uid")}
    rows: list[dict] = []
    skipped: list[tuple] = []
    for row in reports.fillna("").to_dict("records"):
        if not str(row["uid"]).removesuffix(".0").isdigit():
            skipped.append((None, f"uid {row['uid']}", "no study id (uid)"))
            continue
        uid = int(row["uid"])
        mesh = [term.strip() for term in row["MeSH"].split(";") if term.strip()]
        record = _record(uid, {name: str(row[name]).strip() for name in SECTIONS}, mesh)
        candidates = [images.candidate_of_kaggle(uid, name, projection) for name, projection in views.get(uid, [])]
        record["images"] = usable_images(candidates, uid, skipped)
        if record["images"]:
            rows.append(record)
        else:
            skipped.append((uid, f"uid {uid}", "no image of the study is left"))
    raw = pd.DataFrame(rows, columns=_COLUMNS).sort_values("study_id", ignore_index=True)
    return raw, skipped_table(skipped)


def openi_split(uid: int) -> str:
    """Split of an Open-i study (the set has no official one): 80 / 5 / 15 %, fixed by the id alone."""
    percent = zlib.crc32(str(uid).encode()) % 100
    return "test" if percent < 15 else "validate" if percent < 20 else "train"


def parse_report(data: bytes) -> tuple[dict, list[str]]:
    """One XML report -> (record without its images, image ids). Raises SkipFile with the reason."""
    from defusedxml import ElementTree
    from defusedxml.common import DefusedXmlException

    try:
        tree = ElementTree.fromstring(decode_report(data))
    except DefusedXmlException as error:
        raise SkipFile("XML defines entities, which no report needs") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise SkipFile("not well-formed XML") from error
    node = tree.find("uId")
    uid = "" if node is None else node.get("id", "").removeprefix("CXR")
    if not (uid.isascii() and uid.isdigit()):
        raise SkipFile("no study id (uId)")
    found = {e.get("Label", "").lower(): "".join(e.itertext()).strip() for e in tree.iter("AbstractText")}
    sections = {name: found.get(name, "") for name in SECTIONS}
    mesh = [e.text.strip() for e in tree.findall("MeSH/major") if e.text]
    return _record(int(uid), sections, mesh), [e.get("id", "") for e in tree.iter("parentImage")]


def _record(uid: int, sections: dict[str, str], mesh: list[str]) -> dict:
    return {
        "subject_id": uid,  # Open-i does not say which studies share a patient: each counts as its own
        "study_id": uid,
        "split": openi_split(uid),
        "images": [],
        "text": "\n\n".join(f"{name.upper()}: {body}" for name, body in sections.items() if body),
        **sections,
        "mesh": mesh,
    }


class _ImageFolder:
    """The PNGs below a folder, found by image id, with their views."""

    def __init__(self, root: Path):
        self.paths = {path.stem: path for path in sorted(root.rglob("*.png"))}
        if not self.paths:
            raise UserError(
                f"{root} holds no PNG image; unpack NLMCXR_png.tgz there, or leave data_root empty "
                "to work on the text only."
            )
        # torchxrayvision's corrected views (from a t-SNE of the images) win over the DICOM tag, which calls
        # hundreds of laterals PA.
        tags = pd.read_csv(package_file("nlmcxr_dicom_metadata.csv.gz"), usecols=["imageid", "View Position"])
        corrected = pd.read_csv(package_file("nlmcxr_tsne_pa.csv.gz"))
        views = dict(tags.dropna().to_numpy()) | dict(corrected.dropna().to_numpy())
        self.views = {image: "LATERAL" if view in _LATERAL_VIEWS else view for image, view in views.items()}

    def candidates(self, image_ids: list[str]) -> list[tuple[Path, str, str]]:
        return [
            (self.paths.get(image, Path(f"{image}.png")), self.views.get(image, ""), f"{image}.png")
            for image in image_ids
        ]

    def candidate_of_kaggle(self, uid: int, filename: str, projection: str) -> tuple[Path, str, str]:
        """Kaggle's `1_IM-0001-4001.dcm.png` is Open-i's `CXR1_1_IM-0001-4001`, its `2_IM-...` is `CXR2_IM-...`."""
        stem = filename.removesuffix(".png").removesuffix(".dcm")
        known = (self.views.get(f"CXR{uid}_{stem}"), self.views.get(f"CXR{stem}"))
        view = next((view for view in known if view), str(projection).upper())
        return self.paths.get(Path(filename).stem, Path(filename)), view, filename


def package_file(name: str) -> Path:
    # find_spec, because importing the package would import torch
    spec = find_spec("torchxrayvision")
    if spec is None or spec.origin is None:
        raise UserError("The Open-i reports come in torchxrayvision; run: pip install torchxrayvision.")
    return Path(spec.origin).parent / "data" / name


def _report_files(root: Path | None, skipped: list) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, content) of every report: from a folder, else an archive, else the package."""
    if root is not None and (root / "ecgen-radiology").is_dir():
        for path in sorted((root / "ecgen-radiology").glob("*.xml")):
            try:
                yield path.name, file_bytes(path)
            except SkipFile as error:
                skipped.append((None, path.name, str(error)))
        return
    archive = root / "NLMCXR_reports.tgz" if root is not None else None
    if archive is None or not archive.is_file():
        archive = package_file("NLMCXR_reports.tgz")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            yield from _safe_members(tar, skipped)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is not a readable .tgz archive ({error}); download it again.") from error


def _safe_members(tar: tarfile.TarFile, skipped: list) -> Iterator[tuple[str, bytes]]:
    """The XML members, read in memory: nothing is unpacked, so nothing can be written outside a folder."""
    for member in tar:
        path = PurePosixPath(member.name)
        if member.isdir():
            continue
        if not member.isfile() or path.is_absolute() or ".." in path.parts:
            skipped.append((None, member.name, "unsafe archive member"))
        elif member.size > MAX_REPORT_BYTES:
            skipped.append((None, member.name, "report larger than 1 MB"))
        elif path.suffix == ".xml" and (file := tar.extractfile(member)):  # None only for what is no file
            yield member.name, file.read()
