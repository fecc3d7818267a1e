"""The phantom on disk: MIMIC's layout, deterministic, atomic, with its truth apart."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightmedvlm_utils.data.readers import read_studies
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import FINDINGS, LABELS
from lightmedvlm_utils.phantom.dataset import COMPLETE, read_masks, split_of, write_phantom

PATIENTS, SIZE = 24, 64


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "data"
    write_phantom(folder, PATIENTS, SIZE, seed=3, workers=1, progress=False)
    return folder


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(root: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(root / f"mimic-cxr-2.0.0-{name}.csv.gz")


def test_layout_and_columns_are_mimics(root):
    metadata, split, chexpert = (table(root, name) for name in ("metadata", "split", "chexpert"))
    assert list(metadata)[:5] == [
        "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition",
    ]  # fmt: skip
    assert list(split) == ["dicom_id", "study_id", "subject_id", "split"]
    assert list(chexpert) == ["subject_id", "study_id", *LABELS]
    assert chexpert[list(LABELS)].isin([-1, 0, 1, np.nan]).all(axis=None)
    for row in metadata.itertuples():
        patient = root / "files" / f"p{str(row.subject_id)[:2]}" / f"p{row.subject_id}"
        assert (patient / f"s{row.study_id}.txt").is_file()
        assert (patient / f"s{row.study_id}" / f"{row.dicom_id}.jpg").is_file()


def test_images_are_gray_and_of_the_size_asked_for(root):
    broken = set(pd.read_csv(root / "truth" / "broken_images.csv")["dicom_id"])
    good = next(path for path in sorted(root.rglob("*.jpg")) if path.stem not in broken)
    with Image.open(good) as image:
        assert image.mode == "L" and image.size == (SIZE, SIZE)


def test_broken_images_lie_in_training_and_really_fail(root):
    broken = pd.read_csv(root / "truth" / "broken_images.csv")["dicom_id"]
    split = table(root, "split").set_index("dicom_id")["split"]
    assert len(broken) == 3 and (split[broken] == "train").all()
    for dicom_id in broken:
        with pytest.raises(OSError), Image.open(next(root.rglob(f"{dicom_id}.jpg"))) as image:
            image.load()


def test_patients_stay_in_one_split_and_shares_are_80_5_15():
    split = pd.Series([split_of(index) for index in range(1_900)]).value_counts(normalize=True)
    assert split.round(2).to_dict() == {"train": 0.8, "test": 0.15, "validate": 0.05}


def test_readable_by_the_mimic_reader(root):
    raw, skipped = read_studies("phantom", root)
    assert raw.groupby("subject_id")["split"].nunique().max() == 1
    assert set(raw["study_id"]) | set(skipped["study_id"]) == set(table(root, "chexpert")["study_id"])


def test_truth_is_apart_and_complete(root):
    states = pd.read_parquet(root / "truth" / "states.parquet")
    assert list(states) == ["study_id", "label", "severity", "state"]
    assert len(states) == len(LABELS) * table(root, "chexpert")["study_id"].nunique()
    assert states["severity"].between(0, 1).all() and set(states["state"]) <= {-1, 0, 1}
    for dicom_id in table(root, "metadata")["dicom_id"]:
        for label, mask in read_masks(root, dicom_id).items():
            assert label in FINDINGS and mask.shape == (64, 64) and mask.dtype == bool and mask.any()


def test_refiled_reports_are_told_by_date_and_the_truth_lists_them(tmp_path):
    write_phantom(tmp_path / "p", 120, 32, seed=0, workers=1, progress=False)
    truth = pd.read_csv(tmp_path / "p" / "truth" / "refiled.csv")
    raw = read_studies("phantom", tmp_path / "p")[0].set_index("study_id")
    read = truth[truth["study_id"].isin(raw.index)]
    assert len(read) and raw["refiled"].sum() == raw.loc[read["study_id"], "refiled"].sum() == len(read)
    pair = read[read["written_for"].isin(raw.index)].iloc[0]
    assert raw["date"][pair["study_id"]] > raw["date"][pair["written_for"]]
    assert raw["text"][pair["study_id"]] == raw["text"][pair["written_for"]]


def test_frontal_masks_belong_to_true_findings(root):
    metadata = table(root, "metadata")
    present = pd.read_parquet(root / "truth" / "states.parquet").query("state != 0")
    truth = present.groupby("study_id")["label"].agg(set)
    for row in metadata.itertuples():
        assert set(read_masks(root, row.dicom_id)) <= truth.get(row.study_id, set())


def test_independent_of_workers_and_of_the_folder(root, tmp_path):
    write_phantom(tmp_path / "again", PATIENTS, SIZE, seed=3, workers=2, progress=False)
    assert digest(tmp_path / "again") == digest(root)


def test_second_call_writes_nothing_and_other_parameters_replace(tmp_path):
    folder = tmp_path / "p"
    write_phantom(folder, 3, 64, workers=1, progress=False)
    stamp = (folder / COMPLETE).stat().st_mtime_ns
    write_phantom(folder, 3, 64, workers=1, progress=False)
    assert (folder / COMPLETE).stat().st_mtime_ns == stamp
    write_phantom(folder, 4, 64, workers=1, progress=False)
    assert json.loads((folder / COMPLETE).read_text())["patients"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["p"], "temporary folders must not stay behind"


def test_foreign_folders_and_unwritable_places_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match="not a phantom"):
        write_phantom(tmp_path / "mine", 2, 64, progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"
    with pytest.raises(UserError, match="Cannot write"):
        write_phantom(tmp_path / "mine" / "thesis.txt" / "sub", 2, 64, progress=False)


def test_a_patient_does_not_depend_on_how_many_there_are(root, tmp_path):
    write_phantom(tmp_path / "few", 4, SIZE, seed=3, workers=1, progress=False)
    few, many = digest(tmp_path / "few"), digest(root)
    broken = {p for r in (root, tmp_path / "few") for p in pd.read_csv(r / "truth" / "broken_images.csv")["dicom_id"]}
    shared = [name for name in few if name.startswith("files/") and Path(name).stem not in broken]
    assert np.all([few[name] == many[name] for name in shared]) and shared
