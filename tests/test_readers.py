"""The readers on miniatures of the real layouts, whole and damaged."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from lightmedvlm_utils.data.mimic import read_label_tables
from lightmedvlm_utils.data.openi import openi_split
from lightmedvlm_utils.data.readers import read_studies
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS

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


def dated(root: Path, dates: dict[int, tuple]) -> None:
    """Give the metadata StudyDate and StudyTime by study."""
    edit(
        root / METADATA,
        lambda frame: frame.assign(
            StudyDate=frame["study_id"].map(lambda study: dates.get(study, (None, None))[0]),
            StudyTime=frame["study_id"].map(lambda study: dates.get(study, (None, None))[1]),
        ),
    )


def test_of_two_studies_with_one_report_the_later_is_refiled(mimic):
    report(mimic, 1).write_text(f" {report(mimic, 0).read_text()}\n")
    raw, _ = read_studies("mimic", mimic)
    assert raw["date"].isna().all()
    assert raw.loc[raw["refiled"], "study_id"].tolist() == [53189527]  # without dates, by number
    dated(mimic, {50414267: (21130102, 93015.75), 53189527: (21130102, 5959.0), 58765432: (21139999, None)})
    raw, _ = read_studies("mimic", mimic)
    assert raw.loc[raw["refiled"], "study_id"].tolist() == [50414267]
    assert raw["date"][0] == pd.Timestamp("2113-01-02 09:30:15.75") and raw["date"][[1, 3]].isna().all()
    (report(mimic, 1).with_suffix("") / "53189527-0.jpg").unlink()  # the copied report is left without an image
    raw, _ = read_studies("mimic", mimic)
    assert raw.loc[raw["refiled"], "study_id"].tolist() == [50414267] and 53189527 not in set(raw["study_id"])


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


def test_reports_zipped_with_their_folder(mimic):
    with zipfile.ZipFile(mimic / "mimic-cxr-reports.zip", "w") as archive:
        for row in range(len(STUDIES)):
            archive.write(report(mimic, row), "mimic-cxr-reports" / report(mimic, row).relative_to(mimic))
    assert len(read_studies("mimic", mimic)[0]) == 4


def test_published_label_tables(mimic):
    chexpert = pd.read_csv(mimic / CHEXPERT)
    chexpert.to_csv(mimic / "mimic-cxr-2.0.0-negbio.csv.gz", index=False)
    # as in release 2.1.0: no subject_id, another name for Lung Opacity
    read_by_hand = chexpert[3:].drop(columns=["subject_id", "No Finding"])
    read_by_hand = read_by_hand.rename(columns={"Lung Opacity": "Airspace Opacity"}).assign(**{"Airspace Opacity": 1})
    read_by_hand.to_csv(mimic / "mimic-cxr-2.1.0-test-set-labeled.csv", index=False)
    tables = read_label_tables(mimic)
    assert list(tables) == ["chexpert", "negbio", "radiologist"]
    assert all(list(table.columns) == list(LABELS) for table in tables.values())
    assert tables["radiologist"].loc[58765432, "Lung Opacity"] == 1
    assert tables["radiologist"]["No Finding"].isna().all()
    assert read_label_tables(mimic / "files") == {}


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


@pytest.mark.parametrize(("dataset", "root"), [("mimic", ""), ("mimic", "no/such/folder"), ("chestmnist", "")])
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


def make_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"image")


def test_kaggle_form_of_openi(tmp_path):
    reports = pd.DataFrame(
        [
            (1, "normal", "Positive TB test", "None.", "Lungs are clear.", "Normal chest."),
            (2, "Cardiomegaly/borderline;Pulmonary Artery/enlarged", None, None, None, "No acute disease."),
            (3, "normal", None, None, "Lungs are clear.", None),
        ],
        columns=["uid", "MeSH", "indication", "comparison", "findings", "impression"],
    )
    projections = pd.DataFrame(
        [
            (1, "1_IM-0001-3001.dcm.png", "Lateral"),
            (1, "1_IM-0001-4001.dcm.png", "Frontal"),
            (2, "2_IM-0652-1001.dcm.png", "Frontal"),
            (2, "2_IM-9999-1001.dcm.png", "Frontal"),
        ],
        columns=["uid", "filename", "projection"],
    )
    reports.to_csv(tmp_path / "indiana_reports.csv", index=False)
    projections.to_csv(tmp_path / "indiana_projections.csv", index=False)
    make_images(tmp_path / "images" / "images_normalized", *projections["filename"][:3])
    raw, skipped = read_studies("openi", tmp_path)
    assert raw.attrs["layout"] == "Kaggle tables of Open-i"
    assert list(raw["study_id"]) == [1, 2] and raw["split"].tolist() == [openi_split(1), openi_split(2)]
    assert [image["view"] for image in raw.iloc[0]["images"]] == ["PA", "LATERAL"]  # torchxrayvision's corrections
    assert raw.iloc[0]["text"].endswith("FINDINGS: Lungs are clear.\n\nIMPRESSION: Normal chest.")
    assert raw.iloc[1]["findings"] == "" and raw.iloc[1]["mesh"][1] == "Pulmonary Artery/enlarged"
    assert list(skipped["reason"]) == ["image is missing", "no image of the study is left"]
    pd.concat([reports, reports[:1]]).to_csv(tmp_path / "indiana_reports.csv", index=False)
    with pytest.raises(UserError, match="uid 1 more than once"):
        read_studies("openi", tmp_path)
    reports.drop(columns="findings").to_csv(tmp_path / "indiana_reports.csv", index=False)
    with pytest.raises(UserError, match="no column findings"):
        read_studies("openi", tmp_path)


def r2gen(root: Path, **parts: list) -> Path:
    (root / "annotation.json").write_text(json.dumps(parts))
    return root


def r2gen_item(image: str, study: int = 50414267, subject: int = 10000032, text: str = "Lungs are clear.") -> dict:
    path = f"p{subject // 10**6}/p{subject}/s{study}/{image}.jpg"
    return {"id": image, "report": text, "image_path": [path]}


def test_r2gen_annotation_of_mimic(tmp_path):
    """One entry per image; study and patient in the path or beside it."""
    train = [
        r2gen_item("a"), r2gen_item("b"), r2gen_item("c", text="Another text."), r2gen_item("d", 51111111),
        {"id": "e", "report": "No path."}, {"id": "f", "report": None, "study_id": 5, "image_path": ["f.jpg"]},
    ]  # fmt: skip
    val = [r2gen_item("g", 52222222, 11111111) | {"study_id": 52222222, "subject_id": 11111111}]
    root = r2gen(tmp_path, train=train, val=val, test=[])
    make_images(root / "images", *(train[i]["image_path"][0] for i in range(3)), val[0]["image_path"][0])
    raw, skipped = read_studies("mimic", root)
    assert raw.attrs["layout"] == "R2Gen annotation.json"
    assert raw[["subject_id", "study_id", "split"]].to_numpy().tolist() == [
        [10000032, 50414267, "train"],
        [11111111, 52222222, "validate"],
    ]
    assert raw["images"].map(len).tolist() == [2, 1]
    assert list(skipped["reason"]) == [
        "study is listed again with another report or the same images",
        "no study id",
        "no report text",
        "image is missing",
        "no image of the study is left",
    ]
    with pytest.raises(UserError, match="patient 10000032 is in two splits"):
        read_studies("mimic", r2gen(tmp_path, train=train, val=[r2gen_item("x", 53333333)]))


def test_r2gen_annotation_of_iu_xray(tmp_path):
    item = {"id": "CXR2384_IM-0942", "report": "Lungs are clear.", "image_path": ["CXR2384_IM-0942/0.png"]}
    outside = {"id": "CXR7_IM-1", "report": "Clear.", "image_path": ["../../outside.png"]}
    make_images(tmp_path, "images/CXR2384_IM-0942/0.png")
    raw, skipped = read_studies("openi", r2gen(tmp_path, train=[item], val=[outside]))
    assert raw[["subject_id", "study_id", "split"]].to_numpy().tolist() == [[2384, 2384, "train"]]
    assert list(skipped["reason"]) == ["image path leaves the folder", "no image of the study is left"]
    for text in ("[]", "{", '{"train": 3}', '{"train": [], "train": []}', '{"trial": []}'):
        (tmp_path / "annotation.json").write_text(text)
        with pytest.raises(UserError, match="annotation"):
            read_studies("openi", tmp_path)


def test_rexrank(tmp_path):
    mimic_study = {
        "image_path": ["/p10/p10046166/s50051329/a.jpg", "/p10/p10046166/s50051329/b.jpg"],
        "frontal_lateral": ["left lateral", "antero-posterior"],
        "section_findings": "A 1.2-cm granuloma.",
        "section_impression": float("nan"),
        "context": "Age:50-60.Gender:M.Indication: ___-year-old man.Comparison: None.",
        "split": "test",
        "subject_id": 10046166,
    }
    make_images(tmp_path / "files", *(path[1:] for path in mimic_study["image_path"]))
    (tmp_path / "ReXRank_MIMICCXR_test.json").write_text(json.dumps({"50051329": mimic_study}))
    raw, skipped = read_studies("mimic", tmp_path)
    assert raw.attrs["layout"] == "ReXrank JSON" and len(skipped) == 0
    assert raw.iloc[0]["text"] == "INDICATION: ___-year-old man.\n\nFINDINGS: A 1.2-cm granuloma."
    assert [Path(image["path"]).stem for image in raw.iloc[0]["images"]] == ["b", "a"]  # frontal first
    iu = {"CXR38_IM-1911": mimic_study | {"image_path": ["a.jpg"], "split": "valid", "frontal_lateral": ["Frontal"]}}
    del iu["CXR38_IM-1911"]["subject_id"]
    make_images(tmp_path, "a.jpg")
    (tmp_path / "ReXRank_IUXray_valid.json").write_text(json.dumps(iu))
    raw, _ = read_studies("openi", tmp_path)
    assert raw.iloc[0][["subject_id", "study_id", "split"]].tolist() == [38, 38, "validate"]
    assert raw.iloc[0]["images"][0]["view"] == "FRONTAL"


def test_the_official_form_wins(mimic):
    r2gen(mimic, train=[])
    assert read_studies("mimic", mimic)[0].attrs["layout"] == "MIMIC-CXR-JPG 2.1.0"


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
