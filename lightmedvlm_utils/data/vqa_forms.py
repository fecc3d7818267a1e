"""The published VQA data sets as they lie on disk: one raw row a question, with what is wrong with it.

VQA-RAD (Lau et al. 2018, doi 10.1038/sdata.2018.251), SLAKE (Liu et al. 2021, arXiv 2102.09542), MIMIC-CXR-VQA (Bae et
al. 2023, arXiv 2310.18652) and Medical-Diff-VQA (Hu et al. 2023, arXiv 2307.11986). `vqa_sets.read_vqa` brings the
rows of all of them into one form; COLUMNS says what a row holds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.annotations import SPLIT_NAMES, VIEWS
from lightmedvlm_utils.data.mimic import patient_folder
from lightmedvlm_utils.data.sources import read_csv, refuse_duplicates, refuse_two
from lightmedvlm_utils.data.vqa_kinds import (
    ABOUT_ONE,
    MEDICAL_DIFF_KINDS,
    MIMIC_CXR_VQA_KINDS,
    NOTHING,
    SLAKE_KINDS,
    TERMS,
    VQA_RAD_KINDS,
    joined,
    label_and_device,
    normalized,
    plain,
    question_kinds,
    question_text,
)
from lightmedvlm_utils.errors import UserError

COLUMNS = {  # of a raw row, with the value where a set has none
    "source_id": "",  # the set's own number of the question
    "file": "",
    "published": "",  # the split that the set was published with
    "split": "",  # the published one, or one of ours where that one shares images
    "subject_id": pd.NA,  # patient, or image where patients are not known
    "study_id": pd.NA,  # study, or image
    "image": "",  # path below one of the set's folders of images
    "view": "",
    "question": "",
    "answer": "",  # normalized; "" where there is none
    "kind": "",
    "label": "",
    "content": "",  # the set's own type of the question, lower case
    "chest": True,  # whether the image is a chest X-ray
    "reason": "",  # why the question cannot be used, "" where it can
    "reference_id": pd.NA,  # the earlier study of a question about a difference
    "reference_image": "",
}

VQA_RAD_SHARES = {"test": 0.2, "validate": 0.1}  # of the images; a fifth of the questions is the published test split
_VQA_RAD_FIELDS = ["qid", "image_name", "image_organ", "question", "question_type", "answer"]


def read_vqa_rad(folder: Path) -> pd.DataFrame:
    """VQA-RAD as published: one JSON list; test questions have a phrase_type test_freeform or test_para."""
    path = min(folder.glob("VQA_RAD Dataset*.json"))
    frame = _records(path, [*_VQA_RAD_FIELDS, "phrase_type"], ["image_case_url"])
    test = _lower(frame["phrase_type"]).str.startswith("test")
    return _vqa_rad(frame.assign(published=np.where(test, "test", "train")))


def read_vqa_rad_halves(folder: Path) -> pd.DataFrame:
    """VQA-RAD as others pass it on: trainset.json and testset.json, the former with machine-made rephrasings."""
    return _vqa_rad(_splits(folder, {"trainset.json": "train", "testset.json": "test"}, _VQA_RAD_FIELDS))


def _vqa_rad(frame: pd.DataFrame) -> pd.DataFrame:
    image, answer = _of_each(plain, frame["image_name"]), _of_each(normalized, frame["answer"])
    content, question = _lower(frame["question_type"]), _of_each(question_text, frame["question"])
    patient = _patients(image, frame["image_case_url"]) if "image_case_url" in frame else image
    return _rows(
        frame,
        source_id=_of_each(plain, frame["qid"]),
        split=_of_distinct(vqa_rad_split, patient),
        subject_id=_image_numbers(patient, r"synpic(\d{1,15})\.\w+"),
        study_id=_image_numbers(image, r"synpic(\d{1,15})\.\w+"),
        image=image,
        question=question,
        answer=answer,
        kind=question_kinds(content, VQA_RAD_KINDS, question, answer),
        content=content,
        chest=_lower(frame["image_organ"]) == "chest",
    )


def vqa_rad_split(image_name: str) -> str:
    """Our split of VQA-RAD by image, fixed by the name without its suffix: its sha256, read as a share of one."""
    stem = PurePosixPath(image_name).stem.lower()
    share = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:6], "big") / 2**48
    if share < VQA_RAD_SHARES["test"]:
        return "test"
    return "validate" if share < sum(VQA_RAD_SHARES.values()) else "train"


def _patients(image: pd.Series, case: pd.Series) -> pd.Series:
    """The image that stands for each row's patient: the first of its MedPix case where that is known, else itself."""
    case = _of_each(plain, case).groupby(image).transform("max")
    return image.groupby(case.where((case != "") & (image != ""), image)).transform("min")


def read_slake(folder: Path) -> pd.DataFrame:
    """SLAKE: train.json, validation.json (validate.json in older copies) and test.json; English questions only."""
    files = {"train.json": "train", "validation.json": "validate", "validate.json": "validate", "test.json": "test"}
    fields = ["qid", "img_name", "question", "answer", "q_lang", "location", "modality", "content_type"]
    frame = _splits(folder, files, fields)
    image, answer = _of_each(plain, frame["img_name"]), _of_each(normalized, frame["answer"])
    content, question = _lower(frame["content_type"]), _of_each(question_text, frame["question"])
    number = _image_numbers(image, r"xmlab(\d{1,15})/source\.\w+")
    xray = _lower(frame["modality"]).isin(["x-ray", "xray", "x ray"])
    return _rows(
        frame,
        source_id=_of_each(plain, frame["qid"]),
        subject_id=number,
        study_id=number,
        image=image,
        question=question,
        answer=answer,
        kind=question_kinds(content, SLAKE_KINDS, question, answer),
        content=content,
        chest=xray & _lower(frame["location"]).str.match("lung|chest"),  # Lung, Chest_heart, ...
        reason=np.where(_lower(frame["q_lang"]) == "en", "", "question is not in English"),
    )


def read_mimic_cxr_vqa(folder: Path) -> pd.DataFrame:
    """MIMIC-CXR-VQA: train.json, valid.json, test.json. An answer is a list, sorted here and joined by ", ".

    An empty list answers an open question: nothing of the kind is there (`NOTHING`). To a question of yes and no, or
    about the view, the gender or a width, it is no answer.
    """
    fields = ["idx", "split", "image_id", "question", "content_type", "semantic_type", "template_arguments", "answer"]
    files = {"train.json": "train", "valid.json": "validate", "test.json": "test"}
    frame = _splits(folder, files, [*fields, "subject_id", "study_id"])
    _refuse_foreign_splits(frame, folder)
    part, asks = _lower(frame["content_type"]), _lower(frame["semantic_type"])
    question = _of_each(question_text, frame["question"])
    answer = _of_each(joined, frame["answer"])
    empty = pd.Series([isinstance(value, list) for value in frame["answer"]], frame.index) & (answer == "")
    answer = answer.mask(empty & (asks != "verify") & ~part.isin(["plane", "gender", "size"]), NOTHING)
    about = [label_and_device(*_arguments(value)) for value in frame["template_arguments"]]
    ids = {name: pd.to_numeric(frame[name], errors="coerce") for name in ("subject_id", "study_id")}
    kind = question_kinds(part, MIMIC_CXR_VQA_KINDS, question, answer)
    return _rows(
        frame,
        **ids,
        source_id=_of_each(plain, frame["idx"]),
        image=_mimic_images(ids["subject_id"], ids["study_id"], _of_each(plain, frame["image_id"])),
        view="FRONTAL",  # the set takes one frontal film of each study
        question=question,
        answer=answer,
        kind=kind.mask(np.array([device for _, device in about], bool), "device"),
        label=[label for label, _ in about],
        content=part + ", " + asks,
    )


def _refuse_foreign_splits(frame: pd.DataFrame, folder: Path) -> None:
    named = _lower(frame["split"])
    foreign = _of_distinct(lambda name: SPLIT_NAMES.get(name, ""), named) != frame["published"]
    if foreign.any():
        file, split = frame.loc[foreign, "file"].iloc[0], named[foreign].iloc[0]
        raise UserError(f"{folder / file} holds questions of the split {split!r}; download it again.")


def _arguments(value: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The attributes and categories that fill a template: {"attribute": {"0": "pneumonia"}, "category": {}, ...}."""
    filled = value if isinstance(value, dict) else {}
    attributes, categories = filled.get("attribute"), filled.get("category")
    return (
        tuple(map(str, attributes.values())) if isinstance(attributes, dict) else (),
        tuple(map(str, categories.values())) if isinstance(categories, dict) else (),
    )


def read_medical_diff(folder: Path) -> pd.DataFrame:
    """Medical-Diff-VQA: mimic_pair_questions.csv, and mimic_all.csv for the image of each study.

    Its questions have no number: source_id is study_id-ref_id-hash of the question. The findings that answer "what
    abnormalities are seen" are sorted.
    """
    path, all_path = folder / "mimic_pair_questions.csv", folder / "mimic_all.csv"
    keys = ["study_id", "subject_id", "ref_id"]
    columns = [*keys, "question_type", "question", "answer", "split"]
    # As text: pandas would take the answer "none" for a missing one.
    frame = read_csv(path, columns, dtype=str, keep_default_na=False)
    frame[keys] = frame[keys].apply(pd.to_numeric, errors="coerce")
    images = _study_images(all_path, frame)
    published = frame["split"].map(SPLIT_NAMES)
    if published.isna().any():
        unknown = frame["split"][published.isna()].iloc[0]
        raise UserError(f"{path} names the split {unknown!r}; expected train, val and test.")
    content, question = _lower(frame["question_type"]), _of_each(question_text, frame["question"])
    listed, answer = content == "abnormality", _of_each(normalized, frame["answer"])
    answer = answer.mask(listed, _of_distinct(lambda text: ", ".join(sorted(text.split(", "))), answer))
    image, view = (frame["study_id"].map(images[name]).fillna("") for name in ("image", "view"))
    earlier = frame["ref_id"].where(content == "difference")
    hashes = pd.util.hash_array(question.to_numpy(object))
    pairs = zip(frame["study_id"], frame["ref_id"], hashes, strict=True)
    return _rows(
        frame.assign(file=path.name, published=published),
        source_id=[f"{study:.0f}-{ref:.0f}-{number:016x}" for study, ref, number in pairs],
        subject_id=frame["subject_id"],
        study_id=frame["study_id"],
        image=image,
        view=view,
        question=question,
        answer=answer,
        kind=question_kinds(content, MEDICAL_DIFF_KINDS, question, answer),
        label=_of_distinct(lambda text: TERMS[match[1]] if (match := ABOUT_ONE.fullmatch(text)) else "", question),
        content=content,
        reason=np.where(image == "", f"study is not in {all_path.name}", ""),
        reference_id=earlier,
        reference_image=earlier.map(images["image"]).fillna(""),
    )


def _study_images(path: Path, questions: pd.DataFrame) -> pd.DataFrame:
    """Image and view of every study of mimic_all.csv, by study_id."""
    studies = read_csv(path, ["study_id", "subject_id", "dicom_id"], dtype=str, keep_default_na=False)
    keys = ["study_id", "subject_id"]
    studies[keys] = studies[keys].apply(pd.to_numeric, errors="coerce")
    studies = studies.dropna(subset=keys)
    refuse_duplicates(studies, "study_id", path)
    both = pd.concat([studies[keys], questions[keys]])
    refuse_two(both, "study_id", "subject_id", f"{path.parent}: study", "belongs to two patients")
    view = studies["view"].str.lower().map(VIEWS | {"pa": "PA", "ap": "AP"}) if "view" in studies else ""
    image = _mimic_images(studies["subject_id"], studies["study_id"], studies["dicom_id"])
    return pd.DataFrame({"image": image, "view": view}).set_index(studies["study_id"])


# ---- what the readers share ----


def _of_each(function: Callable, values: pd.Series) -> pd.Series:
    """`function` of every value; of objects, which `Series.map` takes three times as long for."""
    return pd.Series([function(value) for value in values.tolist()], values.index, dtype=object)


def _of_distinct(function: Callable, values: pd.Series) -> pd.Series:
    """`function` of every text, computed once for each distinct one."""
    codes, distinct = pd.factorize(values)
    return pd.Series(np.array([function(value) for value in distinct], dtype=object)[codes], values.index)


def _lower(values: pd.Series) -> pd.Series:
    """Names (of a type, a split, ...) as text in lower case; each name is looked at once."""
    texts = _of_each(lambda value: value if isinstance(value, str) else plain(value), values)
    return texts.map({text: plain(text).lower() for text in texts.unique()})


def _image_numbers(names: pd.Series, pattern: str) -> pd.Series:
    """The number in an image's name; of a name without one, a number made from it. It depends on nothing else."""

    def number(name: str) -> int | None:
        match = re.fullmatch(pattern, name)
        hashed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        return int(match[1]) if match else hashed if name else None

    return _of_distinct(number, names)


def _mimic_images(subject: pd.Series, study: pd.Series, dicom: pd.Series) -> pd.Series:
    """`p10/p10000032/s50414267/<dicom>.jpg` of every row; "" where a number or the name is missing."""
    known = subject.notna() & study.notna() & (dicom != "")
    numbers = (ids.where(known, 0).astype("int64").tolist() for ids in (subject, study))
    rows = zip(*numbers, dicom.tolist(), known.tolist(), strict=True)
    paths = [f"{patient_folder(patient)}/s{study}/{name}.jpg" if there else "" for patient, study, name, there in rows]
    return pd.Series(paths, subject.index, dtype=object)


def _rows(frame: pd.DataFrame, **columns) -> pd.DataFrame:
    """Raw rows from the columns that a reader has; `frame` holds file and published, the published split."""
    columns = {"file": frame["file"], "published": frame["published"], "split": frame["published"], **columns}
    rows = pd.DataFrame({name: columns.get(name, default) for name, default in COLUMNS.items()}, index=frame.index)
    numbers = ["subject_id", "study_id", "reference_id"]
    return rows.astype({name: "Int64" for name in numbers}).reset_index(drop=True)


def _splits(folder: Path, files: dict[str, str], fields: list[str]) -> pd.DataFrame:
    """The records of those files of a set that are there, with file and published (split)."""
    found = [
        _records(folder / name, fields).assign(published=split)
        for name, split in files.items()
        if (folder / name).is_file()
    ]
    if not found:
        raise UserError(f"{folder} holds none of {', '.join(files)}; give the folder that holds them.")
    return pd.concat(found, ignore_index=True)


def _records(path: Path, fields: list[str], optional: Iterable[str] = ()) -> pd.DataFrame:
    """A JSON list of objects as a table of `fields` and of those `optional` ones that it has, with column `file`.

    UserError where it is damaged, no such list, or no object has one of the fields.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); download it again.") from error
    if not isinstance(content, list):
        raise UserError(f"{path} holds a {type(content).__name__} instead of a list; is it the right file?")
    odd = next((number for number, record in enumerate(content) if not isinstance(record, dict)), None)
    if odd is not None:
        raise UserError(f"{path}: entry {odd + 1} is a {type(content[odd]).__name__} instead of an object; mend it.")
    missing = [field for field in fields if content and not any(field in record for record in content)]
    if missing:
        raise UserError(f"{path} has no field {', '.join(missing)}; is it the right file?")
    columns = [*fields, *(field for field in optional if any(field in record for record in content))]
    return pd.DataFrame(content, columns=columns, dtype=object).assign(file=path.name)
