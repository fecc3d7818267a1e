"""The readers on miniatures of the real layouts, whole and damaged."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from lightmedvlm_utils.config import LABELS
from lightmedvlm_utils.data.openi import openi_split
from lightmedvlm_utils.data.readers import read_studies
from lightmedvlm_utils.errors import UserError

# subject, study, split, views
STUDIES = [
    (10000032, 50414267, "train", ["AP", "LATERAL", "PA"]),
    (10000032, 53189527, "train", ["PA"]),
    (11000764, 51234567, "validate", ["AP", None]),
    (19999987, 58765432, "test", ["LATERAL"]),
]
METADATA = "mimic-cxr-2.0.0-metadata.csv.gz"
SPLIT = "mimic-cxr-2.0.0-split.csv.gz"
CHEXPERT = "mimic-cxr-2.0.0-chexpert.csv.gz"


@pytest.fixture
def mimic(tmp_path) -> Path:
    """A miniature of MIMIC-CXR-JPG 2.1.0 + reports, label columns in CheXpert's own order."""
    images = []
    for subject, study, split, views in STUDIES:
        folder = tmp_path / "files" / f"p{subject // 10**6}" / f"p{subject}" / f"s{study}"
        folder.mkdir(parents=True)
        folder.with_suffix(".txt").write_text(f"FINDINGS: Study {study}.\n")
        for number, view in enumerate(views):
            (folder / f"{study}-{number}.jpg").write_bytes(b"jpeg")
            images.append((f"{study}-{number}", subject, study, view, split))
    frame = pd.DataFrame(images, columns=["dicom_id", "subject_id", "study_id", "ViewPosition", "split"])
    frame.drop(columns="split").to_csv(tmp_path / METADATA, index=False)
    frame[["dicom_id", "study_id", "subject_id", "split"]].to_csv(tmp_path / SPLIT, index=False)
    labels = frame[["subject_id", "study_id"]].drop_duplicates().reset_index(drop=True)
    for label in reversed(LABELS):
        labels[label] = [1.0, 0.0, -1.0, None]
    labels.to_csv(tmp_path / CHEXPERT, index=False)
    return tmp_path


def edit(path: Path, change) -> None:
    change(pd.read_csv(path)).to_csv(path, index=False)


def report(root: Path, row: int) -> Path:
    subject, study, *_ = STUDIES[row]
    return root / "files" / f"p{subject // 10**6}" / f"p{subject}" / f"s{study}.txt"


def test_mimic_layout(mimic):
    raw, skipped = read_studies("mimic", mimic)
    assert len(skipped) == 0
    assert list(raw["study_id"]) == [50414267, 51234567, 53189527, 58765432]
    first = raw.iloc[0]
    assert [image["view"] for image in first["images"]] == ["PA", "AP", "LATERAL"]
    assert all(Path(image["path"]).is_absolute() for image in first["images"])
    assert first["text"] == "FINDINGS: Study 50414267.\n"
    assert raw.iloc[1]["images"][-1]["view"] == ""
    assert list(raw.columns[-14:]) == list(LABELS)
    assert raw.set_index("study_id").loc[51234567, LABELS[0]] == -1
    assert raw.set_index("study_id").loc[58765432, list(LABELS)].isna().all()
    assert dict(zip(raw["study_id"], raw["split"], strict=True))[51234567] == "validate"


def test_reports_from_zip_equal_reports_from_folder(mimic):
    expected, _ = read_studies("phantom", mimic)
    with zipfile.ZipFile(mimic / "mimic-cxr-reports.zip", "w") as archive:
        archive.writestr("../../escaped.txt", "never asked for")
        for row in range(len(STUDIES)):
            archive.write(report(mimic, row), report(mimic, row).relative_to(mimic))
            report(mimic, row).unlink()
    raw, skipped = read_studies("phantom", mimic)
    pd.testing.assert_frame_equal(raw, expected)
    assert len(skipped) == 0
    assert not (mimic.parent.parent / "escaped.txt").exists()


def test_plain_csv_and_no_label_table(mimic):
    (mimic / METADATA.removesuffix(".gz")).write_bytes(gzip.decompress((mimic / METADATA).read_bytes()))
    (mimic / METADATA).unlink()
    (mimic / CHEXPERT).unlink()
    raw, _ = read_studies("mimic", mimic)
    assert len(raw) == 4 and "Edema" not in raw


def test_unusable_files_are_listed_not_lost(mimic):
    report(mimic, 0).write_bytes("FINDINGS: œdème".encode("latin-1", "replace"))
    report(mimic, 1).unlink()
    (report(mimic, 2).with_suffix("") / "51234567-0.jpg").unlink()
    (report(mimic, 3).with_suffix("") / "58765432-0.jpg").write_bytes(b"")
    raw, skipped = read_studies("mimic", mimic)
    assert list(raw["study_id"]) == [51234567]
    assert len(raw.iloc[0]["images"]) == 1
    reasons = skipped.groupby("study_id")["reason"].agg(list).to_dict()
    assert reasons == {
        50414267: ["report is not UTF-8 text"],
        53189527: ["report is missing"],
        51234567: ["image is missing"],
        58765432: ["image file is empty", "no image of the study is left"],
    }


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def one_image_elsewhere(column: str, value: object):
    """A change of a table that gives its first row another split or patient."""
    return lambda frame: frame.assign(**{column: [value, *frame[column][1:]]})


CONTRADICTIONS = {
    "no metadata": (lambda root: (root / METADATA).unlink(), [METADATA, "missing"]),
    "cut gzip": (lambda root: truncate(root / SPLIT), [SPLIT, "cannot be read"]),
    "no gzip": (lambda root: (root / CHEXPERT).write_bytes(b"text"), [CHEXPERT, "cannot be read"]),
    "empty": (lambda root: (root / SPLIT).write_bytes(gzip.compress(b"")), [SPLIT, "cannot be read"]),
    "no view": (
        lambda root: edit(root / METADATA, lambda f: f.drop(columns="ViewPosition")),
        ["ViewPosition"],
    ),
    "no label": (lambda root: edit(root / CHEXPERT, lambda f: f.drop(columns="Edema")), [CHEXPERT, "Edema"]),
    "study twice": (
        lambda root: edit(root / CHEXPERT, lambda f: pd.concat([f, f[:1]])),
        ["50414267", "once"],
    ),
    "image twice": (lambda root: edit(root / METADATA, lambda f: pd.concat([f, f[:2]])), ["2 repeats"]),
    "split name": (lambda root: edit(root / SPLIT, lambda f: f.replace("validate", "val")), [SPLIT, "'val'"]),
    "no split": (lambda root: edit(root / SPLIT, lambda f: f[1:]), [SPLIT, "no split to 1 images"]),
    "two splits": (
        lambda root: edit(root / SPLIT, one_image_elsewhere("split", "test")),
        [SPLIT, "patient 10000032", "two splits"],
    ),
    "two patients": (
        lambda root: edit(root / METADATA, one_image_elsewhere("subject_id", 10000033)),
        ["study 50414267", "two patients"],
    ),
    "no zip": (lambda root: (root / "mimic-cxr-reports.zip").write_bytes(b"x"), ["mimic-cxr-reports.zip"]),
    "no reports": (lambda root: [report(root, row).unlink() for row in range(4)], ["report is missing: 4"]),
}


@pytest.mark.parametrize(("damage", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_errors_that_name_the_file(mimic, damage, words):
    damage(mimic)
    with pytest.raises(UserError) as error:
        read_studies("mimic", mimic)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("dataset", "root"), [("mimic", ""), ("mimic", "no/such/folder"), ("chestmnist", "")]
)
def test_wrong_arguments(dataset, root):
    with pytest.raises(UserError):
        read_studies(dataset, root)


def openi_xml(uid: int, images: tuple = (), findings: str = "Lungs are clear.") -> str:
    parents = "".join(f'<parentImage id="{image}"/>' for image in images)
    return (
        f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{uid}"/><Abstract>'
        f'<AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION"/>'
        f"</Abstract><MeSH><major>normal</major></MeSH>{parents}</eCitation>"
    )


BOMB = '<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a "aa"><!ENTITY c "&a;&a;">]><eCitation>&c;</eCitation>'


def test_openi_folder(tmp_path):
    reports = tmp_path / "ecgen-radiology"
    reports.mkdir()
    ids = ("CXR1_1_IM-0001-4001", "CXR1_1_IM-0001-3001")
    (reports / "1.xml").write_text(openi_xml(1, ids))
    (reports / "2.xml").write_text(openi_xml(2, ("CXR2_IM-0652-1001",)))
    (reports / "3.xml").write_text(openi_xml(1, ids))
    (reports / "4.xml").write_text("<eCitation>")
    (reports / "5.xml").write_text(BOMB)
    (reports / "6.xml").write_text(openi_xml(6).replace("uId", "other"))
    (tmp_path / "png").mkdir()
    for image in ids:
        (tmp_path / "png" / f"{image}.png").write_bytes(b"png")
    raw, skipped = read_studies("openi", tmp_path)
    assert list(raw["study_id"]) == [1]
    assert raw.iloc[0]["findings"] == "Lungs are clear." and raw.iloc[0]["mesh"] == ["normal"]
    assert {Path(image["path"]).stem for image in raw.iloc[0]["images"]} == set(ids)
    assert "LATERAL" in [image["view"] for image in raw.iloc[0]["images"]]
    assert list(skipped["reason"]) == [
        "image is missing",
        "no image of the study is left",
        "study id already read from another file",
        "not well-formed XML",
        "XML defines entities, which no report needs",
        "no study id (uId)",
    ]


def test_openi_archive_cannot_escape(tmp_path):
    (tmp_path / "CXR7_IM-1.png").write_bytes(b"png")
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as tar:
        for name in ("ecgen-radiology/7.xml", "../escaped.xml", "/escaped.xml"):
            data = openi_xml(7, ("CXR7_IM-1",)).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("ecgen-radiology/8.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    raw, skipped = read_studies("openi", tmp_path)
    assert list(raw["study_id"]) == [7]
    assert list(skipped["reason"]) == ["unsafe archive member"] * 3
    assert not (tmp_path.parent / "escaped.xml").exists()
    truncate(tmp_path / "NLMCXR_reports.tgz")
    with pytest.raises(UserError, match=r"NLMCXR_reports\.tgz"):
        read_studies("openi", tmp_path)


def test_openi_split_is_fixed_and_near_80_5_15():
    splits = pd.Series([openi_split(uid) for uid in range(1, 4000)])
    assert openi_split(1) == "train"
    shares = splits.value_counts(normalize=True)
    assert abs(shares["train"] - 0.80) < 0.03 and abs(shares["test"] - 0.15) < 0.03


def test_openi_reports_of_the_package():
    raw, skipped = read_studies("openi")
    assert len(raw) == 3955 and raw["study_id"].is_unique and len(skipped) == 0
    assert raw["images"].map(len).eq(0).all()
    assert (raw["findings"] != "").sum() > 3300
