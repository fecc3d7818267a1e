"""The three training stages as notebooks 04 to 06 run them: where a stage starts, what it learns from, what it leaves.

Each stage's folder holds one checkpoint per connector, and its `history.json` beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lightmedvlm_utils.config import HOW
from lightmedvlm_utils.course.fingerprint import NOT_INPUTS, code_of, setting_value
from lightmedvlm_utils.course.steps import Step
from lightmedvlm_utils.data.boxes import box_masks, read_boxes
from lightmedvlm_utils.data.images import image_size
from lightmedvlm_utils.data.questions import build_questions
from lightmedvlm_utils.data.vqa_sets import VQASet, read_vqa
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import digest, write_json
from lightmedvlm_utils.inference import Reporter, StudyFeatures
from lightmedvlm_utils.learning.cache import ImageCache
from lightmedvlm_utils.learning.checkpoints import Checkpoints
from lightmedvlm_utils.learning.examples import Example, question_examples, report_examples
from lightmedvlm_utils.learning.features import FEATURES, FeatureStore, ImageStore, Store, encode_studies
from lightmedvlm_utils.learning.loop import evaluate_loss, prepare_stage, train, warm_up_diseases
from lightmedvlm_utils.model.backbones import from_profile
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import Processor
from lightmedvlm_utils.observations import LABELS
from lightmedvlm_utils.phantom.dataset import MASK_SIZE, read_masks
from lightmedvlm_utils.settings import flatten

STEPS = {1: "04_stage1_alignment", 2: "05_stage2_report_generation", 3: "06_stage3_vqa"}


@dataclass
class StageResult:
    """A trained stage: `history` as `learning.loop.train` returns it, `folder` holds the checkpoint."""

    model: LightMedVLM
    processor: Processor
    history: list[dict]
    folder: Path


def stage_table(step: Step, last: int) -> pd.DataFrame:
    """What the stages up to `last` learn, from what, and at which rates: one row a stage."""
    rows = {}
    for number, learns_from in {1: "reports", 2: "reports, balanced", 3: "questions"}.items():
        if number > last:
            break
        values = step.profile.stage(number)
        if number == 3 and values.report_replay:
            learns_from += f" + {values.report_replay:.0%} of the reports"
        row: dict[str, Any] = {"learns": " + ".join(values.learns), "from": learns_from}
        row |= {"epochs": values.epochs, "batch": values.batch_size}
        rates = {f"rate, {part}": rate for part, rate in values.rates().items()}
        rows[f"stage {number}"] = row | rates
    return pd.DataFrame.from_dict(rows, orient="index").fillna("frozen")


def start_of_stage(step: Step, number: int, connector: str) -> tuple[LightMedVLM, Processor]:
    """The model as stage `number` finds it: new from the backbones, or the checkpoint of the stage before, loaded
    strictly."""
    if number == 1:
        return from_profile(step.profile, connector, step.seed)
    folder = step.path(STEPS[number - 1], connector)
    return LightMedVLM.from_pretrained(folder), Processor.from_pretrained(folder)


def image_store(step: Step, number: int, studies: pd.DataFrame, model: LightMedVLM, processor: Processor) -> Store:
    """Where a stage takes its images from: what the model's connector reads of the features that notebook 03 has
    computed, or the images themselves where the encoder learns, or has learned in a stage before."""
    learned = any("vision" in step.profile.stage(earlier).learns for earlier in range(1, number + 1))
    if learned or processor.views != "mean":
        return ImageStore(studies, processor, image_cache(step, processor))
    return FeatureStore.load(step.path("03_building_sasa", FEATURES)).last(max(1, model.connector.num_stages))


def image_cache(step: Step, processor: Processor) -> ImageCache:
    """The images of all the run's studies, resized once; kept for the later stages, and for other runs where the
    setting `image_cache` names a folder."""
    shown = step.studies("01_data_cleaning", "studies.parquet")["images"]
    paths = [image["path"] for images in shown for image in images[: processor.max_views]]
    folder = Path(step.resolved.image_cache or step.root / "image_cache")
    return ImageCache(folder, paths, processor).build()


def study_features(step: Step, reporter: Reporter, studies: pd.DataFrame) -> list[StudyFeatures]:
    """What the reporter's connector reads of every study: notebook 03's features, where no stage has trained the
    encoder, else computed with the reporter's own."""
    if any("vision" in step.profile.stage(number).learns for number in STEPS):
        return reporter.features([[image["path"] for image in images] for images in studies.images])
    store = FeatureStore.load(step.path("03_building_sasa", FEATURES))
    return store.last(max(1, reporter.model.connector.num_stages)).studies(studies.study_id)


def published_questions(step: Step) -> VQASet | None:
    """The published VQA data set that a notebook's parameter `vqa_data` names; None where it names none.

    Its studies get negative ids, so that none of them is taken for one of the run's own.
    """
    root = step.parameters.get("vqa_data", "")
    if not root:
        return None
    return _read_published(root, str(step.data_root or "") if step.dataset == "mimic" else "")


@lru_cache(maxsize=1)  # asked for by every connector and split, and a large set takes half a minute to read
def _read_published(root: str, image_root: str) -> VQASet:
    found = read_vqa(root, image_root)
    studies, questions = (table.assign(study_id=-table["study_id"]) for table in (found.studies, found.questions))
    return found._replace(studies=studies, questions=questions)


def with_published_images(step: Step, store: Store, model: LightMedVLM, processor: Processor) -> Store:
    """A stage's images together with those of the published VQA data set, if the run has one."""
    published = published_questions(step)
    if published is None:
        return store
    if isinstance(store, FeatureStore):
        return store.joined(encode_studies(model, processor, published.studies))
    store.add(published.studies)
    return store


def stage_examples(step: Step, number: int, studies: pd.DataFrame, processor: Processor, split: str) -> list[Example]:
    """What stage `number` learns from (`split="train"`) or is measured on (`"validate"`).

    Stages 1 and 2 learn reports; with `true_findings` a connector with a detector is told what they find, so that the
    text learns to say what it is told, and the detector's mistakes teach it nothing. Stage 3 learns questions (the
    run's own, or those of the published data set that the parameter `vqa_data` names), with `report_replay` of the
    reports among them so that one model keeps both skills; its validation has questions alone.
    """
    settings = step.profile.stage(number)
    rows = studies[studies.split == split]
    if rows.empty:
        raise UserError(f"The study table has no {split} studies; run notebooks 01 and 02 on more data.")
    told = settings.true_findings and split == "train"
    if number < 3:
        return report_examples(rows, processor, told)
    published = published_questions(step)
    if published is not None:
        asked, shown = published.questions[published.questions["split"] == split], published.studies
    else:
        synthetic = settings.synthetic_minority and split == "train"
        asked, shown = build_questions(rows, settings.questions_per_study, step.seed, synthetic), rows
    questions = question_examples(asked, shown, processor)
    if split == "train" and settings.report_replay > 0:
        reports = report_examples(rows, processor, told)
        count = round(settings.report_replay * len(reports))
        questions += [reports[i] for i in np.random.default_rng(step.seed).permutation(len(reports))[:count]]
    return questions


class WarmUp(NamedTuple):
    """What the disease warm-up of a stage has made: the model, and the mean loss of each epoch."""

    model: LightMedVLM
    losses: list[float]


def warm_up(step: Step, number: int, connector: str, training: pd.DataFrame) -> WarmUp | None:
    """The disease warm-up with which a stage begins, done on the model that the stage starts from; None where the stage
    or the connector has none."""
    profile, settings = step.profile, step.profile.stage(number)
    model, processor = start_of_stage(step, number, connector)
    if not (settings.disease_warmup and model.connector.has_disease_head):
        return None
    store = image_store(step, number, training, model, processor)
    rows = training[training.split == "train"]
    examples = report_examples(rows, processor)
    if settings.mask_share:
        examples = with_masks(step, examples, rows, settings.mask_share)
    states = checkpoints(step, number, connector, "warm-up")
    options = (store, settings, step.seed, profile.precision, states)
    return WarmUp(model, warm_up_diseases(model, processor, examples, *options))


def run_stage(
    step: Step,
    number: int,
    connector: str,
    training: pd.DataFrame,
    validation: pd.DataFrame,
    warm: WarmUp | None = None,
) -> StageResult:
    """Train one stage of one connector and save it, or load it where the step is up to date, or had trained it when a
    later cell failed. One that was interrupted goes on from its last state.

    `training` and `validation` are study tables; only their train and validate rows are used. With a disease warm-up
    (`warm`, if it has been done already) the history starts with two records of step 0, from before and after it.
    """
    folder = step.folder / connector
    history_path = step.folder / f"{connector}_history.json"
    done, states = step.unfinished(connector) / "trained.json", checkpoints(step, number, connector)
    if step.up_to_date or _is_trained(done, states.made_from):
        model, processor = LightMedVLM.from_pretrained(folder), Processor.from_pretrained(folder)
        return StageResult(model, processor, json.loads(history_path.read_text()), folder)
    profile, settings = step.profile, step.profile.stage(number)
    model, processor = start_of_stage(step, number, connector)
    prepare_stage(model, settings, profile.lora_rank, profile.lora_alpha, profile.lora_dropout, step.seed)
    store = image_store(step, number, pd.concat([training, validation]), model, processor)
    if number == 3:
        store = with_published_images(step, store, model, processor)
    held_out = stage_examples(step, number, validation, processor, "validate")
    examples = stage_examples(step, number, training, processor, "train")
    history = []
    warm = warm or warm_up(step, number, connector, training)
    if warm is not None:
        history = [{"step": 0, "epoch": 0, **evaluate_loss(model, processor, held_out, store, profile.precision)}]
        model.connector.load_state_dict(warm.model.connector.state_dict())
        print(f"disease warm-up: loss {warm.losses[0]:.3f} in its first epoch, {warm.losses[-1]:.3f} in its last")
    options = (held_out, step.seed, profile.precision)
    history += train(model, processor, examples, store, settings, *options, checkpoints=states)
    save_checkpoint(model, processor, folder)
    write_json(history_path, history)
    write_json(done, states.made_from)
    states.clear()
    return StageResult(model, processor, history, folder)


# What training depends on beside data, settings and weights.
_CODE = ("learning", "model", "data", "phantom", "course/stages.py")


def checkpoints(step: Step, number: int, connector: str, part: str = "training") -> Checkpoints:
    """Where a stage of one connector keeps the states from which it goes on, as long as it is made from the same."""
    ignored = {*NOT_INPUTS, "connectors"}
    made_from = {
        "parameters": {name: value for name, value in step.parameters.items() if name not in ignored},
        "settings": {name: setting_value(step.resolved, name) for name in flatten(step.resolved) if name not in HOW},
        "inputs": {name: manifest["fingerprint"] for name, manifest in step.inputs.items()},
        "code": code_of(_CODE),
    }
    folder = step.unfinished(connector) / part
    return Checkpoints(folder, digest([number, connector, made_from]), step.resolved.save_minutes)


def _is_trained(done: Path, made_from: str) -> bool:
    """Whether this very stage was trained before the step was interrupted."""
    try:
        return json.loads(done.read_text(encoding="utf-8")) == made_from
    except (OSError, ValueError):
        return False


def with_masks(step: Step, examples: Sequence[Example], studies: pd.DataFrame, share: float) -> list[Example]:
    """The examples, a share of those whose findings somebody has outlined with their masks; UserError for a data set
    without any."""
    masks = dict(zip(studies.study_id, finding_masks(step, studies), strict=True))
    if not any(masks.values()):
        raise UserError(
            f"The data set {step.dataset} has no finding masks here; set stage1.mask_share to 0, or finding_boxes to "
            "MS-CXR's or Chest ImaGenome's folder."
        )
    outlined = [study_id for study_id in dict.fromkeys(studies.study_id) if masks[study_id]]
    order = np.random.default_rng(step.seed).permutation(len(outlined))
    drawn = {outlined[i] for i in order[: round(share * len(outlined))]}
    print(f"masks: {len(drawn)} of the {len(outlined)} studies that have any")
    return [
        replace(example, masks=_mask_stack(masks[example.study_id])) if example.study_id in drawn else example
        for example in examples
    ]


def finding_masks(step: Step, studies: pd.DataFrame) -> list[dict[str, np.ndarray]]:
    """Where the findings of each study's first image are, as far as it is known: label -> (MASK_SIZE, MASK_SIZE) bool,
    in the frame that the encoder sees.

    Phantoms know it themselves; of other data sets those that the setting `finding_boxes` has boxes of. What could not
    be read of those is counted.
    """
    paths = [images[0]["path"] if len(images) else "" for images in studies.images]
    films = [Path(path).stem for path in paths]
    root, boxes_path = step.data_root, step.profile.finding_boxes
    if step.dataset == "phantom" and root is not None:
        return [read_masks(root, film) for film in films]
    if not boxes_path:
        return [{} for _ in films]
    boxes, skipped = read_boxes(boxes_path, films)
    for reason, count in skipped["reason"].value_counts().items():
        print(f"{boxes_path}: skipped {count}, {reason}")
    by_film = dict(list(boxes.groupby("dicom_id")))
    return [
        box_masks(by_film[film], image_size(path), MASK_SIZE) if film in by_film else {}
        for film, path in zip(films, paths, strict=True)
    ]


def _mask_stack(masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """(14, h, w) bool of the masks by label; all False where a label has none."""
    stack = np.zeros((len(LABELS), MASK_SIZE, MASK_SIZE), bool)
    for label, mask in masks.items():
        stack[LABELS.index(label)] = mask
    return stack


def save_checkpoint(model: LightMedVLM, processor: Processor, folder: Path) -> None:
    """Write a checkpoint folder; it replaces an older one only when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    _remove(partial)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    _remove(folder)
    partial.rename(folder)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def loss_curve(history: Sequence[dict]) -> pd.DataFrame:
    """History as a table of `step`, `text_loss` (training) and `validation_loss`."""
    return pd.DataFrame(history).reindex(columns=["step", "epoch", "text_loss", "validation_loss"])
