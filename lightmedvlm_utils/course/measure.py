"""What one trained run is worth: its last checkpoint on one split, in the few figures that runs are compared by.

Notebook 07 takes a run apart; this measures many runs alike. Every figure comes as bootstrap draws, whose weights
depend on the patients and the seed alone: those of two runs on the same patients are paired, row by row.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from lightmedvlm_utils import inference
from lightmedvlm_utils.course.stages import STEPS, finding_masks, study_features
from lightmedvlm_utils.course.steps import Step
from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.data.questions import build_questions, normalize_answers
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.evaluation.baselines import nearest_neighbors, other_patient, token_summary
from lightmedvlm_utils.evaluation.bootstrap import bootstrap_weights
from lightmedvlm_utils.evaluation.facts import fact_draws
from lightmedvlm_utils.evaluation.localization import localization_table, mean_masks
from lightmedvlm_utils.evaluation.scorers import VQAScorer, finding_draws
from lightmedvlm_utils.observations import FINDINGS

# Every figure and its title, in the order of tables.
FIGURES = {
    "label_f1": "label macro-F1",
    "rare_label_f1": "the six rarest labels",
    "fact_f1": "fact F1",
    "side_right": "side right",
    "contradictions": "contradict themselves",
    "auroc": "AUROC of findings",
    "pointing_game": "pointing game",
    "pointing_game_no_heart": "without cardiomegaly",
    "vqa": "yes/no balanced accuracy",
    "vqa_open": "open answers right",
    "validation_loss": "validation loss",
}
LOWER_IS_BETTER = ("contradictions", "validation_loss")
RARE = 6
QUESTIONS_PER_STUDY = 10
NEIGHBORS = "nearest neighbor", "nearest by findings"
USUAL_PLACE = "mean training mask"


def measure(step: Step, stage: int, connector: str, split: str, baselines: bool = False) -> dict[str, metrics.Draws]:
    """Figures of a run's `connector` after training stage 1, 2 or 3 on the studies of `split`: `{"": {figure: draws}}`.

    What cannot be asked is missing: questions before stage 3, findings of a connector without labels, places where
    there are no true masks. With `baselines` also those of retrieval (NEIGHBORS, by the encoder's tokens and by the
    connector's findings, among the training studies) and of USUAL_PLACE.
    """
    studies = step.studies("01_data_cleaning", "studies.parquet")
    studies = studies[studies["report"].str.strip() != ""].sort_values("study_id", ignore_index=True)
    train, shown = (studies[studies["split"] == part].reset_index(drop=True) for part in ("train", split))
    if shown.empty:
        raise UserError(f"The study table of {step.root} has no {split} studies to measure; choose another split.")
    folder = step.path(STEPS[stage], connector)
    batch_size = step.profile.eval_batch_size
    reporter = inference.load(folder, precision=step.profile.precision, batch_size=batch_size)
    weights = bootstrap_weights(shown["subject_id"], step.profile.bootstrap_samples, step.seed)
    features = study_features(step, reporter, shown)
    found = _report_figures(reporter.report(features, step.profile.num_beams), train, shown, weights)
    if reporter.model.connector.has_disease_head:
        found |= {"auroc": finding_draws(shown, reporter.findings(features), weights)["all labels"]}
    if stage == 3:
        found |= _question_figures(step, reporter, shown, features)
    history = json.loads((folder.parent / f"{connector}_history.json").read_text(encoding="utf-8"))
    losses = [record["validation_loss"] for record in history if "validation_loss" in record]
    found["validation_loss"] = np.full(len(weights), losses[-1])
    places = _place_figures(step, reporter, train, shown)
    measured = {"": found | places.pop("", {})}
    return measured | _retrieved(step, reporter, train, shown, features, weights) | places if baselines else measured


def _report_figures(reports: list[str], train: pd.DataFrame, shown: pd.DataFrame, weights: np.ndarray) -> metrics.Draws:
    truth, said = label_reports(shown["report"]), label_reports(reports)
    by_label = metrics.per_label_draws(truth, said, weights)
    rare = sorted(FINDINGS, key=lambda label: int((train[label] == 1).sum()))[:RARE]
    with_any = np.ma.masked_invalid([by_label[label] for label in rare if label in by_label])
    facts = fact_draws(shown["report"].tolist(), reports, weights)
    return {
        "label_f1": metrics.label_draws(truth, said, weights, "positive")["label_macro_f1"],
        "rare_label_f1": with_any.mean(0).filled(np.nan),
        **{name: facts[name] for name in ("fact_f1", "side_right", "contradictions")},
    }


def _question_figures(step: Step, reporter: inference.Reporter, shown: pd.DataFrame, features: list) -> metrics.Draws:
    asked = build_questions(shown, QUESTIONS_PER_STUDY, step.seed)
    asked["subject_id"] = asked["study_id"].map(shown.set_index("study_id")["subject_id"])
    of_study = dict(zip(shown["study_id"], features, strict=True))
    answers = reporter.answer([of_study[study] for study in asked["study_id"]], asked["question"].tolist())
    said = normalize_answers(asked, [answer.answer for answer in answers])
    scorer = VQAScorer(asked, step.profile.bootstrap_samples, step.seed)
    closed, opened = (scorer.draws(section, said) for section in ("all questions", "open questions"))
    found = {"vqa": closed["balanced_accuracy"]}
    return found | ({"vqa_open": opened["accuracy"]} if opened else {})


def _place_figures(
    step: Step, reporter: inference.Reporter, train: pd.DataFrame, shown: pd.DataFrame
) -> dict[str, metrics.Draws]:
    """The pointing game of the connector's maps and of the usual place, where true masks are known."""
    masks = finding_masks(step, shown) if reporter.model.connector.has_attention_maps else []
    if not any(masks):
        return {}
    frontal = [images[0]["path"] for images in shown["images"]]
    usual = mean_masks(finding_masks(step, train))
    patients = shown["subject_id"].to_numpy()
    maps = [reporter.attention(seen) for seen in reporter.features(frontal)]
    other = other_patient(patients, step.seed).tolist()
    table = localization_table(maps, masks, patients, other, "", usual)
    found: dict[str, metrics.Draws] = {}
    for system, name in (("", ""), ("mean_mask", USUAL_PLACE)):
        own = table[table["system"] == system]
        parts = {"pointing_game": own, "pointing_game_no_heart": own[own["label"] != "Cardiomegaly"]}
        found[name] = {
            figure: metrics.mean(part["pointing_game"].to_numpy(), _weights(step, part))
            for figure, part in parts.items()
            if len(part)
        }
    return found


def _weights(step: Step, part: pd.DataFrame) -> np.ndarray:
    return bootstrap_weights(part["subject_id"], step.profile.bootstrap_samples, step.seed)


def _retrieved(
    step: Step, reporter: inference.Reporter, train: pd.DataFrame, shown: pd.DataFrame, features: list, weights
) -> dict[str, metrics.Draws]:
    """The report of the training study that is most alike, by tokens and by findings."""
    pool = study_features(step, reporter, train)
    seen = {NEIGHBORS[0]: [token_summary([study.tokens.numpy() for study in part]) for part in (pool, features)]}
    if reporter.model.connector.has_disease_head:
        seen[NEIGHBORS[1]] = [reporter.findings(part) for part in (pool, features)]
    found = {}
    for name, (known, asked) in seen.items():
        reports = train["report"].iloc[nearest_neighbors(known, asked)].tolist()
        found[name] = _report_figures(reports, train, shown, weights)
    return found
