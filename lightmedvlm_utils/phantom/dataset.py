"""Write the phantom data set to disk in the layout of MIMIC-CXR-JPG 2.1.0 with its reports beside it.

The ground truth (true states, finding masks, which images are broken and which reports misfiled on purpose) lies
apart, in `truth/`: no reader of the data set looks there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.data.reports import clean_report, parse_sections, report_text
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import digest, file_code_hash, write_json
from lightmedvlm_utils.observations import LABELS

from .images import render
from .patients import Patient, Study, View, sample_patients, true_states
from .reports import write_report

COMPLETE = "phantom.json"  # in the root of a finished data set: what it was made from
MASK_SIZE = 64  # masks are kept on a coarse grid; attention maps are coarser still
DUPLICATE_RATE = 0.02  # share of follow-up studies filed with the previous study's report
JPEG_QUALITY = 92

_VIEW_NAMES = {"PA": "postero-anterior", "AP": "antero-posterior", "LATERAL": "lateral"}


def write_phantom(
    root: Path | str,
    patients: int,
    size: int,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write `patients` phantom patients with images of `size` x `size` pixels under `root`.

    The result depends on `patients`, `size` and `seed`, not on `workers` (processes; all cores by default).
    `root` appears only when complete. A second call with the same arguments returns at once; with others it
    replaces the data set. Raises UserError where `root` holds anything else or cannot be written.
    """
    root = Path(root)
    made_from = {"patients": patients, "size": size, "seed": seed, "generator": _generator_hash()}
    if is_complete(root, made_from):
        return
    if root.exists() and not (root / COMPLETE).is_file() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists and is not a phantom data set; choose another folder or empty it.")
    partial = root.with_name(f".{root.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        _write(partial, sample_patients(patients, seed), size, seed, workers, progress)
        write_json(partial / COMPLETE, made_from)
        if root.exists():
            shutil.rmtree(root)
        partial.rename(root)
    except OSError as error:
        raise UserError(f"Cannot write the phantom to {root} ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_complete(root: Path | str, made_from: dict) -> bool:
    """Whether `root` is a finished phantom made from these values."""
    try:
        return json.loads((Path(root) / COMPLETE).read_text(encoding="utf-8")) == made_from
    except (OSError, ValueError):
        return False


def split_of(index: int) -> str:
    """Split of the patient with this index: 80 % train, 5 % validate, 15 % test, patients never shared."""
    return {2: "test", 9: "test", 16: "test", 6: "validate"}.get(index % 20, "train")


def phantom_studies(root: Path | str) -> dict[int, Study]:
    """The records behind a finished phantom, by study id: with them a film can be drawn again, or drawn differently."""
    made_from = json.loads((Path(root) / COMPLETE).read_text(encoding="utf-8"))
    patients = sample_patients(made_from["patients"], made_from["seed"])
    return {study.study_id: study for patient in patients for study in patient.studies}


def read_masks(root: Path | str, dicom_id: str) -> dict[str, np.ndarray]:
    """True finding masks of one image, coarse: label -> bool (64, 64); only findings that the view shows."""
    with np.load(Path(root) / "truth" / "masks" / f"{dicom_id}.npz") as packed:
        return {label: np.unpackbits(packed[label]).astype(bool).reshape(MASK_SIZE, MASK_SIZE) for label in packed}


def _generator_hash() -> str:
    """Stands for the code that makes the data set: an edited generator makes another phantom."""
    package = Path(__file__).parents[1]
    sources = [*sorted((package / "phantom").glob("*.py")), package / "data/labels.py", package / "data/reports.py"]
    return digest([file_code_hash(source) for source in sources])


# ------------------------------------------------------------------------------------------------ writing


def _write(
    folder: Path, patients: Sequence[Patient], size: int, seed: int, workers: int | None, progress: bool
) -> None:
    broken = _choose_broken(patients, seed)
    (folder / "truth" / "masks").mkdir(parents=True)
    jobs = (joblib.delayed(_write_patient)(folder, patient, size, seed, broken) for patient in patients)
    pool = joblib.Parallel(n_jobs=workers or joblib.cpu_count(), return_as="generator")
    texts: dict[int, str] = {}
    written_for: dict[int, int] = {}
    bar = tqdm(pool(jobs), total=len(patients), desc="phantom patients", disable=not progress, mininterval=2)
    for of_patient in bar:
        texts.update(of_patient[0])
        written_for.update(of_patient[1])
    _write_tables(folder, patients, size, texts)
    _write_truth(folder, patients, broken, written_for)


def _write_patient(
    folder: Path, patient: Patient, size: int, seed: int, broken: dict[str, str]
) -> tuple[dict[int, str], dict[int, int]]:
    """Write one patient's images, masks and reports; return what `_patient_reports` does."""
    home = folder / "files" / f"p{str(patient.subject_id)[:2]}" / f"p{patient.subject_id}"
    texts, written_for = _patient_reports(patient, seed)
    for study in patient.studies:
        study_folder = home / f"s{study.study_id}"
        study_folder.mkdir(parents=True)
        (home / f"s{study.study_id}.txt").write_text(texts[study.study_id], encoding="utf-8")
        for view in study.views:
            image, masks = render(study, view, size)
            data = _damage(_jpeg(image), broken.get(view.dicom_id, ""))
            (study_folder / f"{view.dicom_id}.jpg").write_bytes(data)
            _write_masks(folder / "truth" / "masks" / f"{view.dicom_id}.npz", masks)
    return texts, written_for


def _patient_reports(patient: Patient, seed: int) -> tuple[dict[int, str], dict[int, int]]:
    """By study id: the report's text, and the study that it was written for (of a refiled report, an earlier one).

    The patient's own generator makes them independent of order and workers.
    """
    rng = np.random.default_rng([seed, patient.subject_id])
    texts: dict[int, str] = {}
    written_for: dict[int, int] = {}
    prior: Study | None = None
    for study in patient.studies:
        text = write_report(study, rng, prior)
        duplicated = rng.random() < DUPLICATE_RATE
        texts[study.study_id], written_for[study.study_id] = text, study.study_id
        if prior and duplicated:  # a copy of a copy was written for the first of the three
            texts[study.study_id], written_for[study.study_id] = texts[prior.study_id], written_for[prior.study_id]
        prior = study
    return texts, written_for


def _jpeg(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _damage(data: bytes, how: str) -> bytes:
    return {"empty": b"", "truncated": data[: len(data) // 3]}.get(how, data)


def _write_masks(path: Path, masks: dict[str, np.ndarray]) -> None:
    packed: dict[str, Any] = {}  # Any: savez has options of its own beside the arrays
    for label, mask in masks.items():
        coarse = Image.fromarray(mask.astype(np.uint8) * 255).resize((MASK_SIZE, MASK_SIZE), Image.Resampling.BOX)
        cells = np.asarray(coarse) > 0  # any pixel of the cell: a tube is thinner than a cell
        if cells.any():
            packed[label] = np.packbits(cells)
    np.savez(path, **packed)


def _choose_broken(patients: Sequence[Patient], seed: int) -> dict[str, str]:
    """Pick training images to damage: dicom_id -> "truncated" or "empty".

    Two studies lose their only image and one loses its lateral view, as the cleaning notebook has to find out.
    """
    training = [study for i, patient in enumerate(patients) if split_of(i) == "train" for study in patient.studies]
    single = [study.views[0] for study in training if len(study.views) == 1]
    lateral = [study.views[1] for study in training if len(study.views) > 1]
    rng = np.random.default_rng([seed, len(patients)])
    return {
        _pick(views, rng).dicom_id: how
        for views, how in ((single[::2], "truncated"), (single[1::2], "empty"), (lateral, "truncated"))
        if views
    }


def _pick(views: Sequence[View], rng: np.random.Generator) -> View:
    return views[int(rng.integers(len(views)))]


# ------------------------------------------------------------------------------------------------- tables


def _write_tables(folder: Path, patients: Sequence[Patient], size: int, texts: dict[int, str]) -> None:
    """Write the metadata, split and CheXpert tables with MIMIC-CXR-JPG's columns."""
    metadata = pd.DataFrame(_metadata_rows(patients, size))
    splits = {patient.subject_id: split_of(i) for i, patient in enumerate(patients)}
    split = metadata[["dicom_id", "study_id", "subject_id"]].assign(split=metadata["subject_id"].map(splits))
    studies = metadata[["subject_id", "study_id"]].drop_duplicates(ignore_index=True)
    labels = label_reports([_labelled_text(texts[study_id]) for study_id in studies["study_id"]])
    _write_csv(metadata, folder / "mimic-cxr-2.0.0-metadata.csv.gz")
    _write_csv(split, folder / "mimic-cxr-2.0.0-split.csv.gz")
    _write_csv(pd.concat([studies, labels], axis=1), folder / "mimic-cxr-2.0.0-chexpert.csv.gz")


def _labelled_text(text: str) -> str:
    sections = parse_sections(text)
    return report_text(clean_report(sections["findings"]), clean_report(sections["impression"]))


def _metadata_rows(patients: Sequence[Patient], size: int) -> Iterator[dict]:
    for patient in patients:
        # Dates are shifted into the future, as in MIMIC, by an offset of the patient's own.
        first = date(2110, 1, 1) + timedelta(days=patient.anatomy_seed % 25_000)
        for study in patient.studies:
            step = "CHEST (PORTABLE AP)" if study.portable else "CHEST (PA AND LAT)"
            for number, view in enumerate(study.views):
                yield {
                    "dicom_id": view.dicom_id,
                    "subject_id": study.subject_id,
                    "study_id": study.study_id,
                    "PerformedProcedureStepDescription": step,
                    "ViewPosition": view.position,
                    "Rows": size,
                    "Columns": size,
                    "StudyDate": int((first + timedelta(days=study.day)).strftime("%Y%m%d")),
                    "StudyTime": 70_000 + study.study_id % 12 * 10_000 + view.seed % 59 * 100 + number,
                    "ProcedureCodeSequence_CodeMeaning": step,
                    "ViewCodeSequence_CodeMeaning": _VIEW_NAMES[view.position],
                    "PatientOrientationCodeSequence_CodeMeaning": "Recumbent" if study.portable else "Erect",
                }


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    # A fixed time in the gzip header keeps the file identical from run to run.
    frame.to_csv(path, index=False, compression={"method": "gzip", "mtime": 0})


def _write_truth(
    folder: Path, patients: Sequence[Patient], broken: dict[str, str], written_for: dict[int, int]
) -> None:
    """Write truth/states.parquet (study_id, label, severity, state), truth/broken_images.csv and truth/refiled.csv.

    The last lists the studies whose file holds another study's report: study_id, written_for.
    """
    rows = [
        (study.study_id, label, *states[label])
        for patient in patients
        for study in patient.studies
        for states in [true_states(study)]
        for label in LABELS
    ]
    states = pd.DataFrame(rows, columns=["study_id", "label", "severity", "state"])
    states.to_parquet(folder / "truth" / "states.parquet", index=False)
    damaged = pd.DataFrame(list(broken.items()), columns=["dicom_id", "damage"])
    damaged.to_csv(folder / "truth" / "broken_images.csv", index=False)
    refiled = [(study_id, source) for study_id, source in written_for.items() if study_id != source]
    pd.DataFrame(refiled, columns=["study_id", "written_for"]).to_csv(folder / "truth" / "refiled.csv", index=False)
