"""The readers of VQA data sets on miniatures of the real layouts, with what is odd in the real files."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightmedvlm_utils.data.labels import label_sentence
from lightmedvlm_utils.data.vqa_forms import vqa_rad_split
from lightmedvlm_utils.data.vqa_kinds import TERMS
from lightmedvlm_utils.data.vqa_sets import QUESTION_COLUMNS, STUDY_COLUMNS, read_vqa
from lightmedvlm_utils.errors import UserError

DICOM = "02aa804e-bde0afdd-112c0b34-7bc16630-{}"


def put_image(path: Path, content: bytes = b"jpeg") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def put_json(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=4))


def rad(qid, image, question, answer, types="PRES", phrase="freeform", organ="CHEST", answer_type="CLOSED"):
    return {
        "qid": qid, "image_name": image, "image_organ": organ, "question": question, "answer": answer,
        "answer_type": answer_type, "question_type": types, "phrase_type": phrase,
        "image_case_url": f"https://medpix.nlm.nih.gov/case?id={image}",
    }  # fmt: skip


ODD_RAD = [
    rad("900", "synpic501.jpg", "Is there a pneumothorax?", "Yes ", answer_type="CLOSED "),
    rad("901", "synpic501.jpg", "How many ribs are seen?", 12, "COUNT", answer_type="OPEN"),
    rad("902", "synpic501.jpg", "Is the lesion on the left or right?", "Right", "POS"),
    rad(
        "903", "synpic501.jpg", "Where is the  lesion \tlocated?", "Right upper lobe.", "POS, PRES", answer_type="OPEN"
    ),
    rad("904", "synpic501.jpg", "Are the lungs normal?", "no", "ABN"),
    rad("905", "synpic501.jpg", "What is wrong with the lungs?", "Nodules", "ABN", answer_type="OPEN"),
    rad("906", "synpic501.jpg", "Is this an AP or PA film?", "AP", "PLANE"),
    rad("907", "synpic501.jpg", "Is/Are the diaphragm  flattened? -yes/no", "No", "ATTRIB"),
    rad("908", "synpic501.jpg", "Is there a pneumothorax", "yes"),  # asked twice
    rad("909", "synpic501.jpg", "Is the trachea midline?", "yes"),  # and answered twice
    rad("910", "synpic501.jpg", "Is the trachea midline?", "no"),
    rad("911", "synpic502.jpg", "Is there a fracture?", "no"),  # image is missing
    rad("912", "synpic503.jpg", "Is there a fracture?", "no"),  # image is empty
    rad("913", "../secret.jpg", "Is there a fracture?", "no"),
    rad("914", "synpic504.jpg", "Is there an infarct?", "no", organ="HEAD"),
    rad("915", "synpic501.jpg", "Is there an effusion?", None),
    rad("916", "synpic501.jpg", "", "no"),
    rad("917", None, "Is there a fracture?", "no"),
    rad("918", "synpic501.jpg", "Is the heart normal or abnormal?", "Normal", "ABN"),
]


def write_vqa_rad(root: Path) -> None:
    """30 images, each asked in the published training and test part; one question in both."""
    rows = list(ODD_RAD)
    for number in range(30):
        name = f"synpic{100 + number}.jpg"
        put_image(root / "VQA_RAD Image Folder" / name)
        rows.append(rad(str(2 * number), name, "Is there an effusion?", "no"))
        question = "Is there an effusion?" if number == 0 else "Is the heart enlarged?"
        rows.append(rad(str(2 * number + 1), name, question, "No", "SIZE", "test_para"))
    put_image(root / "VQA_RAD Image Folder" / "synpic501.jpg")
    put_image(root / "VQA_RAD Image Folder" / "synpic503.jpg", b"")
    put_image(root / "VQA_RAD Image Folder" / "synpic504.jpg")
    put_image(root / "secret.jpg")
    put_json(root / "VQA_RAD Dataset Public.json", rows)


def write_vqa_rad_halves(root: Path) -> None:
    for name in ("synpic1.jpg", "synpic2.jpg"):
        put_image(root / "images" / name)
    frame = [rad(number, "synpic1.jpg", "Is/Are the lung abnormal?", "No", "ABN", "frame") for number in (1, 2)]
    put_json(root / "trainset.json", [*frame, rad(3, "synpic2.jpg", "Is there edema?", "no")])
    put_json(root / "testset.json", [rad(4, "synpic2.jpg", "Is there a mass?", "Yes")])


def slake(qid, image, question, answer, content, lang="en", location="Lung", modality="X-Ray", answer_type="OPEN"):
    return {
        "img_id": image, "img_name": f"xmlab{image}/source.jpg", "question": question, "answer": answer, "q_lang": lang,
        "location": location, "modality": modality, "answer_type": answer_type, "base_type": "vqa",
        "content_type": content, "triple": ["vhead", "_", "_"], "qid": qid,
    }  # fmt: skip


def write_slake(root: Path) -> None:
    for image in (1, 2, 3, 4, 5):
        put_image(root / "imgs" / f"xmlab{image}" / "source.jpg")
    train = [
        slake(1, 1, "What diseases are included in the picture?", "Pneumonia,  Nodule", "Abnormality"),
        slake(2, 1, "Can nodule be observed on the upper right lung in this picture?", "Yes", "Abnormality"),
        slake(3, 1, "Is the lung healthy?", "No", "Abnormality", answer_type="CLOSED"),
        slake(4, 1, "Where is/are the abnormality located?", "Right Lung, Lower Left", "Position"),
        slake(5, 1, "Which side of lung is abnormal in this image,left or right?", "Right", "Abnormality"),
        slake(6, 1, "Which part of the body does this image belong to?", "Chest", "Position"),
        slake(7, 1, "图中包含哪些疾病？", "肺炎", "Abnormality", lang="zh"),
        slake(8, 2, "What modality is used to take this image?", "CT", "Modality", modality="CT"),
        slake(9, 2, "How many kidneys in this image?", "2", "Quantity", location="Abdomen", modality="MRI"),
        slake(10, 1, "Which organ is abnormal, heart or lung?", "", "Abnormality"),
        slake(11, 3, "Is the lung healthy?", "Yes", "Abnormality", location="Chest_lung"),  # its image is in test too
    ]
    test = [slake(30, 3, "Are there abnormalities in this image?", "No", "Abnormality", answer_type="CLOSED")]
    put_json(root / "train.json", train)
    put_json(root / "validate.json", [slake(20, 4, "What color is the lung?", "Black", "Color")])
    put_json(root / "test.json", test)


def mimic(split, idx, patient, study, question, answer, content, asks, attribute=(), category=(), image=None):
    arguments = {"object": {"0": "left lung"}, "viewpos": {}, "gender": {}}
    for name, terms in (("attribute", attribute), ("category", category)):
        arguments[name] = {str(number): term for number, term in enumerate(terms)}
    image = DICOM.format(image or study)
    return {
        "split": split, "idx": idx, "subject_id": str(patient), "study_id": str(study), "image_id": image,
        "image_path": f"p{str(patient)[:2]}/p{patient}/s{study}/{image}.jpg", "question": question,
        "content_type": content, "semantic_type": asks, "template": "", "template_program": "program_2",
        "template_arguments": arguments, "answer": answer,
    }  # fmt: skip


def put_mimic_images(root: Path, studies: list[tuple[int, int]]) -> None:
    for patient, study in studies:
        put_image(root / "files" / f"p{str(patient)[:2]}" / f"p{patient}" / f"s{study}" / f"{DICOM.format(study)}.jpg")


def write_mimic_cxr_vqa(root: Path) -> None:
    a, b, c, d = (10000032, 50000001), (10000032, 50000002), (11000764, 50000003), (12000000, 50000004)
    put_mimic_images(root, [a, b, c, d])
    devices = ["tubesandlines", "device"]
    train = [
        mimic("train", 0, *a, "Is there pneumonia in the left lung?", ["yes"], "presence", "verify", ["pneumonia"]),
        mimic("train", 1, *a, "Is there a rib fracture?", ["no"], "presence", "verify", ["rib fracture"]),
        mimic("train", 2, *a, "List all findings.", ["lung opacity", "atelectasis"], "attribute", "query"),
        mimic("train", 3, *a, "List all diseases.", [], "attribute", "query", category=["disease"]),
        mimic("train", 4, *a, "Are there any tubes/lines or devices?", ["no"], "presence", "verify", (), devices),
        mimic("train", 5, *a, "Is there a picc?", ["no"], "presence", "verify", ["picc"]),
        mimic("train", 6, *a, "Are there both edema and pneumonia?", ["no"], "presence", "verify", ["a", "pneumonia"]),
        mimic("train", 7, *a, "List all places of atelectasis.", ["left lung"], "anatomy", "query", ["atelectasis"]),
        mimic("train", 8, *a, "Is the left lung abnormal?", ["yes"], "abnormality", "verify"),
        mimic("train", 9, *a, "List all abnormalities.", [], "abnormality", "query"),
        mimic("train", 10, *b, "Which view is in this image, AP or PA?", ["ap"], "plane", "choose"),
        mimic("train", 11, *b, "What is the gender of this patient?", ["f"], "gender", "query"),
        mimic("train", 12, *b, "Is there edema?", [], "presence", "verify", ["edema"]),  # no answer
        mimic("train", 13, *b, "What is the view of this image?", [], "plane", "query"),  # no answer either
        mimic("train", 14, 13000000, 50000009, "Is there edema?", ["no"], "presence", "verify"),  # no image
        mimic("train", 0, *d, "Is there edema?", ["no"], "presence", "verify"),  # patient is in test
    ]
    put_json(root / "dataset" / "train.json", train)
    put_json(root / "dataset" / "valid.json", [mimic("valid", 0, *c, "Is there edema?", ["no"], "presence", "verify")])
    put_json(root / "dataset" / "test.json", [mimic("test", 0, *d, "Is it wide?", "yes", "size", "verify")])
    put_json(root / "dataset" / "ans2idx.json", [])


def write_medical_diff(root: Path) -> None:
    a, b, c, d = (10000032, 50000001), (10000032, 50000002), (11000764, 50000003), (12000000, 50000004)
    put_mimic_images(root, [a, b, c, d])
    columns = ["study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split"]
    many = "what abnormalities are seen in this image?"
    rows = [
        (a[1], a[0], b[1], "presence", "is there evidence of edema in this image?", "no", "train"),
        (a[1], a[0], b[1], "presence", "is there pleural effusion in the left lower area?", "yes", "train"),
        (a[1], a[0], b[1], "presence", "is there pleural thickening?", "no", "train"),
        (a[1], a[0], b[1], "abnormality", many, "pneumothorax, edema", "train"),
        (a[1], a[0], b[1], "abnormality", "is there evidence of any abnormalities in this image?", "yes", "train"),
        (a[1], a[0], b[1], "location", "is the edema located on the left side or right side?", "left side", "train"),
        (a[1], a[0], b[1], "location", "where in the image is the edema located?", "left basal area", "train"),
        (a[1], a[0], b[1], "level", "what level is the edema?", "None", "train"),
        (a[1], a[0], b[1], "type", "what type is the edema?", "interstitial", "train"),
        (a[1], a[0], b[1], "view", "which view is this image taken?", "AP view", "train"),
        (a[1], a[0], b[1], "difference", "what has changed?", "nothing has changed.", "train"),
        (a[1], a[0], 50000008, "abnormality", many, "edema, pneumothorax", "train"),  # the same again
        (a[1], a[0], 50000008, "difference", "what has changed?", "nothing has changed.", "train"),  # no image of it
        (50000007, 13000000, b[1], "presence", "is there edema?", "no", "train"),  # not in mimic_all.csv
        (c[1], c[0], b[1], "presence", "is there edema?", "no", "val"),
        (d[1], d[0], b[1], "presence", "is there edema?", "no", "train"),  # patient is in test
        (d[1], d[0], b[1], "presence", "is there pneumonia?", "no", "test"),
    ]
    pd.DataFrame(rows, columns=columns).to_csv(root / "mimic_pair_questions.csv", index=False)
    view = ["antero-posterior", "postero-anterior", None, "postero-anterior"]
    studies = pd.DataFrame([a, b, c, d], columns=["subject_id", "study_id"]).assign(view=view)
    studies["dicom_id"] = studies["study_id"].map(DICOM.format)
    studies.to_csv(root / "mimic_all.csv", index=False)


SETS = {
    "vqa-rad": write_vqa_rad,
    "vqa-rad in two files": write_vqa_rad_halves,
    "slake": write_slake,
    "mimic-cxr-vqa": write_mimic_cxr_vqa,
    "medical-diff-vqa": write_medical_diff,
}
every_set = pytest.mark.parametrize("write", SETS.values(), ids=SETS)


def files_of(root: Path) -> list[Path]:
    """The files with the questions."""
    found = [path for path in (*root.glob("**/*.json"), *root.glob("mimic_pair*.csv")) if path.stem != "ans2idx"]
    assert found
    return found


def count(root: Path) -> int:
    return sum(len(json.loads(p.read_text()) if p.suffix == ".json" else pd.read_csv(p)) for p in files_of(root))


def by_id(read) -> dict[str, tuple]:
    """source_id -> (kind, label, answer, closed)."""
    return {row.source_id: (row.kind, row.label, row.answer, row.closed) for row in read.questions.itertuples()}


def reasons(read) -> dict[str, str]:
    return dict(zip(read.skipped["source_id"], read.skipped["reason"], strict=True))


@every_set
@pytest.mark.parametrize("options", [{}, {"chest_only": False, "differences": True}, {"published_split": True}])
def test_nothing_is_lost_and_nothing_shared(write, options, tmp_path):
    write(tmp_path)
    read = read_vqa(tmp_path, **options)
    name, title, studies, questions, skipped, shared = read
    assert name in SETS and title
    assert len(questions) + len(skipped) == count(tmp_path) and (skipped["reason"] != "").all()
    assert list(studies) == STUDY_COLUMNS and list(questions)[: len(QUESTION_COLUMNS)] == QUESTION_COLUMNS
    assert studies["study_id"].is_unique and set(questions["study_id"]) <= set(studies["study_id"])
    assert all(len(images) == 1 and Path(images[0]["path"]).is_file() for images in studies["images"])
    assert (questions["closed"] == questions["answer"].isin(["yes", "no"])).all()
    assert (questions["answer"] == questions["answer"].str.lower().str.strip()).all() and (
        questions["answer"] != ""
    ).all()
    assert not questions.duplicated(
        ["study_id", "question", "split", *questions.columns[len(QUESTION_COLUMNS) :]]
    ).any()
    if not options.get("published_split"):
        both = questions.merge(studies, on="study_id", suffixes=("", "_of_study"))
        assert shared == 0 and (both["split"] == both["split_of_study"]).all()
        assert (studies.groupby("subject_id")["split"].nunique() == 1).all()


@every_set
def test_order_of_the_files_does_not_matter(write, tmp_path):
    write(tmp_path)
    expected = [read_vqa(tmp_path), read_vqa(tmp_path, chest_only=False, differences=True, published_split=True)]
    for path in files_of(tmp_path):
        if path.suffix == ".csv":
            pd.read_csv(path, keep_default_na=False).sample(frac=1, random_state=1).to_csv(path, index=False)
        else:
            put_json(path, random.Random(1).sample(rows := json.loads(path.read_text()), len(rows)))
    found = [read_vqa(tmp_path), read_vqa(tmp_path, chest_only=False, differences=True, published_split=True)]
    for old, new in zip(expected, found, strict=True):
        for before, after in zip(old[2:5], new[2:5], strict=True):
            pd.testing.assert_frame_equal(before, after)


def test_vqa_rad(tmp_path):
    write_vqa_rad(tmp_path)
    read = read_vqa(tmp_path)
    found, left_out = by_id(read), reasons(read)
    assert found["900"] == ("presence", "", "yes", True) and found["901"] == ("count", "", "12", False)
    assert found["902"] == ("side", "", "right", False) and found["903"] == ("zone", "", "right upper lobe", False)
    assert found["904"] == ("normality", "", "no", True) and found["905"] == ("abnormality", "", "nodules", False)
    assert found["918"] == ("normality", "", "normal", False)
    assert found["906"] == ("view", "", "ap", False) and found["907"] == ("attribute", "", "no", True)
    asked = read.questions.set_index("source_id")
    assert asked.loc["903", "question"] == "Where is the lesion located?" and asked.loc["903", "content"] == "pos, pres"
    assert asked.loc["907", "question"] == "Is/Are the diaphragm flattened?"
    assert left_out["908"] == "question is asked twice of the image" and left_out["1"] == left_out["908"]
    assert left_out["909"] == left_out["910"] == "question has different answers for the image"
    assert (left_out["911"], left_out["912"]) == ("image is missing", "image file is empty")
    assert left_out["913"] == "image path leaves the folder" and left_out["914"] == "image is not a chest X-ray"
    assert (left_out["915"], left_out["916"]) == ("no answer", "no question")
    assert left_out["917"] == "no study or image named" and len(left_out) == 11
    assert "914" in by_id(read_vqa(tmp_path, chest_only=False))
    assert set(read.studies["study_id"]) == {501, *range(100, 130)} and set(read.studies["split"]) == {
        "train", "validate", "test"
    }  # fmt: skip


def test_vqa_rads_own_split_is_fixed_and_near_the_published_shares():
    known = {54610: "validate", 29265: "train", 42202: "test"}
    assert {number: vqa_rad_split(f"synpic{number}.jpg") for number in known} == known
    shares = Counter(vqa_rad_split(f"synpic{number}.jpg") for number in range(5000))
    assert np.allclose([shares["test"] / 5000, shares["validate"] / 5000], [0.2, 0.1], atol=0.02)


def test_vqa_rads_published_split_tells_what_it_shares(tmp_path):
    write_vqa_rad(tmp_path)
    read = read_vqa(tmp_path, published_split=True)
    assert read.shared == 30
    assert reasons(read)["0"] == "question is asked twice of the image" and "1" in by_id(read)
    assert set(read.questions["split"]) == {"train", "test"}


def test_images_of_one_case_stay_together(tmp_path):
    write_vqa_rad(tmp_path)
    path = tmp_path / "VQA_RAD Dataset Public.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["image_case_url"] = "https://medpix.nlm.nih.gov/case?id=one"
    put_json(path, rows)
    studies = read_vqa(tmp_path).studies
    assert studies["subject_id"].nunique() == 1 and studies["split"].nunique() == 1 and len(studies) == 31


def test_vqa_rad_in_two_files_takes_the_split_from_them(tmp_path):
    write_vqa_rad_halves(tmp_path)
    read = read_vqa(tmp_path, published_split=True)
    assert dict(zip(read.questions["source_id"], read.questions["split"], strict=True)) == {
        "1": "train", "3": "train", "4": "test",
    }  # fmt: skip
    assert read.shared == 1 and reasons(read) == {"2": "question is asked twice of the image"}


def test_slake(tmp_path):
    write_slake(tmp_path)
    read = read_vqa(tmp_path)
    assert by_id(read) == {
        "1": ("abnormality", "", "pneumonia, nodule", False),
        "2": ("presence", "", "yes", True),
        "3": ("normality", "", "no", True),
        "4": ("zone", "", "right lung, lower left", False),
        "5": ("side", "", "right", False),
        "6": ("position", "", "chest", False),
        "20": ("color", "", "black", False),
        "30": ("normality", "", "no", True),
    }
    assert reasons(read) == {
        "7": "question is not in English",
        "8": "image is not a chest X-ray",
        "9": "image is not a chest X-ray",
        "10": "no answer",
        "11": "image is in the test split too",
    }
    assert list(read.studies["study_id"]) == [1, 3, 4] and list(read.studies["split"]) == ["train", "test", "validate"]
    assert by_id(read_vqa(tmp_path, chest_only=False))["9"] == ("count", "", "2", False)


def test_mimic_cxr_vqa(tmp_path):
    write_mimic_cxr_vqa(tmp_path)
    read = read_vqa(tmp_path)
    train = read._replace(questions=read.questions[read.questions["split"] == "train"])
    assert by_id(train) == {
        "0": ("presence", "Pneumonia", "yes", True),
        "1": ("presence", "", "no", True),  # a rib fracture is a fracture, but its absence is no label's
        "2": ("attribute", "", "atelectasis, lung opacity", False),
        "3": ("attribute", "", "none", False),
        "4": ("device", "Support Devices", "no", True),
        "5": ("device", "", "no", True),
        "6": ("presence", "", "no", True),
        "7": ("zone", "Atelectasis", "left lung", False),
        "8": ("normality", "", "yes", True),
        "9": ("abnormality", "", "none", False),
        "10": ("view", "", "ap", False),
        "11": ("gender", "", "f", False),
    }
    assert reasons(read) == {
        "12": "no answer",
        "13": "no answer",
        "14": "image is missing",
        "0": "patient is in the test split too",
    }
    assert read.studies["images"].iloc[0][0]["view"] == "FRONTAL"
    assert read_vqa(tmp_path, published_split=True).shared == 1


def test_medical_diff(tmp_path):
    write_medical_diff(tmp_path)
    read = read_vqa(tmp_path)
    found = {row.question: (row.kind, row.label, row.answer) for row in read.questions.itertuples()}
    assert found["is there evidence of edema in this image?"] == ("presence", "Edema", "no")
    assert found["is there pleural effusion in the left lower area?"] == ("presence", "Pleural Effusion", "yes")
    assert found["is there pleural thickening?"] == ("presence", "", "no")
    assert found["what abnormalities are seen in this image?"] == ("abnormality", "", "edema, pneumothorax")
    assert found["is there evidence of any abnormalities in this image?"] == ("normality", "", "yes")
    assert found["is the edema located on the left side or right side?"] == ("side", "Edema", "left side")
    assert found["where in the image is the edema located?"] == ("zone", "Edema", "left basal area")
    assert found["what level is the edema?"] == ("severity", "Edema", "none")  # a word, not a gap in the table
    assert found["what type is the edema?"] == ("type", "Edema", "interstitial")
    assert found["which view is this image taken?"] == ("view", "", "ap view")
    assert Counter(read.skipped["reason"]) == {
        "question compares two studies": 2,
        "question is asked twice of the image": 1,
        "study is not in mimic_all.csv": 1,
        "patient is in the test split too": 1,
    }
    assert [image["view"] for [image] in read.studies["images"]] == ["AP", "", "PA"]


def test_questions_about_differences_bring_their_earlier_study(tmp_path):
    write_medical_diff(tmp_path)
    read = read_vqa(tmp_path, differences=True)
    [asked] = read.questions[read.questions["kind"] == "difference"].itertuples()
    assert (asked.study_id, asked.reference_id, asked.answer) == (50000001, 50000002, "nothing has changed")
    assert {50000001, 50000002} <= set(read.studies["study_id"])
    assert Counter(read.skipped["reason"])["image of the earlier study is not known"] == 1


def test_images_may_lie_elsewhere(tmp_path):
    write_mimic_cxr_vqa(tmp_path / "set")
    (tmp_path / "set" / "files").rename(tmp_path / "files")
    for image_root in (tmp_path, tmp_path / "files"):
        assert len(read_vqa(tmp_path / "set", image_root).questions) == 14
    with pytest.raises(UserError, match=r"No usable question in .*, with images in .* \(image is missing: 16"):
        read_vqa(tmp_path / "set")


def test_a_study_with_two_images_is_asked_about_one(tmp_path):
    write_mimic_cxr_vqa(tmp_path)
    path = tmp_path / "dataset" / "valid.json"
    row = json.loads(path.read_text())[0]
    other = row | {"idx": 1, "image_id": DICOM.format("z")}
    put_image(tmp_path / "files" / f"p11/p11000764/s50000003/{DICOM.format('z')}.jpg")
    put_json(path, [other, row])
    read = read_vqa(tmp_path)
    assert read.skipped.query("file == 'valid.json'")["reason"].tolist() == [
        "question is about another image of the study"
    ]


def test_labels_are_what_the_labeler_calls_them():
    assert {term: label_sentence(f"{term}.") for term in TERMS} == {t: ((label, 1.0),) for t, label in TERMS.items()}


def damage(name: str, change):
    def apply(root: Path) -> None:
        path = root / name
        path.write_text(change(path.read_text()))

    return apply


def without(name: str, field: str):
    return damage(name, lambda text: text.replace(f'"{field}"', '"renamed"').replace(f"{field},", "renamed,"))


ERRORS = {
    "cut": ("slake", damage("train.json", lambda text: text[:-20]), r"train\.json is not readable JSON"),
    "field": ("slake", without("test.json", "q_lang"), r"test\.json has no field q_lang"),
    "no list": ("slake", damage("train.json", lambda _: '{"a": 1}'), r"train\.json holds a dict instead of a list"),
    "no object": ("slake", damage("train.json", lambda _: "[{}, 5]"), r"train\.json: entry 2 is a int"),
    "foreign": ("mimic-cxr-vqa", damage("dataset/valid.json", lambda t: t.replace('"valid"', '"train"')), "'train'"),
    "rad": ("vqa-rad", without("VQA_RAD Dataset Public.json", "phrase_type"), r"Public\.json has no field phrase_type"),
    "column": ("medical-diff-vqa", without("mimic_pair_questions.csv", "ref_id"), r"csv has no column ref_id"),
    "dicoms": ("medical-diff-vqa", lambda root: (root / "mimic_all.csv").unlink(), r"mimic_all\.csv is missing"),
    "split": ("medical-diff-vqa", damage("mimic_pair_questions.csv", lambda t: t.replace(",val", ",dev")), "'dev'"),
    "patients": (
        "medical-diff-vqa",
        damage("mimic_all.csv", lambda text: text.replace("12000000", "12000001")),
        "study 50000004 belongs to two patients",
    ),
    "two sets": ("slake", write_medical_diff, "holds slake and medical-diff-vqa"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message"), ERRORS.values(), ids=ERRORS)
def test_what_is_damaged_is_refused_in_one_sentence(name, spoil, message, tmp_path):
    SETS[name](tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read_vqa(tmp_path)
    assert "\n" not in str(error.value)


def test_an_unknown_folder_is_told_what_was_looked_for(tmp_path):
    put_json(tmp_path / "questions.json", [])
    with pytest.raises(UserError) as error:
        read_vqa(tmp_path)
    for name in ("VQA-RAD", "validation.json", "ans2idx.json", "mimic_pair_questions.csv"):
        assert name in str(error.value)
    write_slake(tmp_path)
    for root, images in ((tmp_path / "absent", ""), (tmp_path, tmp_path / "absent")):
        with pytest.raises(UserError, match="is not a folder"):
            read_vqa(root, images)
