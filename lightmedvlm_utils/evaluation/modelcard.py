"""The model card of a run, written from its records and manifests: no number in it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pandas as pd

from lightmedvlm_utils.config import NOT_FOR_CLINICAL_USE, Profile
from lightmedvlm_utils.evaluation.bootstrap import PROTOCOL
from lightmedvlm_utils.evaluation.systems import MINUS
from lightmedvlm_utils.files import SHIPPED_BACKBONES

# (heading, task, section, {metric: column title}, protocol) of the tables in the card.
_TABLES = (
    (
        "Reports: findings named (label F1 by a rule-based labeler, uncertain counts as positive)",
        ("report", "findings+impression", "study_uncertain_positive"),
        {"label_macro_f1": "macro F1", "label_micro_f1": "micro F1", "label_macro_f1_5": "macro F1, 5 labels"},
    ),
    (
        "Reports: overlap of words",
        ("report", "findings+impression", "study"),
        {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "cider": "CIDEr"},
    ),
    (
        "Reports: facts (finding, state, side, zone and size together; see evaluation/facts.py)",
        ("report", "findings+impression", "study"),
        {
            "fact_f1": "fact F1",
            "side_right": "side right, where both name one",
            "contradictions": "reports that contradict themselves",
            "invented_priors": "reports that invent a prior study",
        },
    ),
    (
        "Reports: overlap of words as in R2Gen's tables (findings; rare words and long references' ends left out)",
        ("report", "findings", "r2gen"),
        {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"},
    ),
    (
        "Yes/no questions",
        ("vqa", "all questions", "study"),
        {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "mcc": "MCC", "ece": "calibration error"},
    ),
    (
        "Localization: does the attention of a disease query find its finding?",
        ("localization", "all findings", "study"),
        {
            "pointing_game": "pointing game",
            "inside_mass": "mass inside the finding",
            "counterfactual_leaves": "leaves the report with the film's",
            "counterfactual_others_stay": "the others stay",
            "occlusion_wins": "hiding its place costs most",
        },
    ),
)

_LIMITS = """\
- {clinical}
- A fluent report is not a correct report. Read every number beside the system that saw another patient's image.
- Labels come from rules on report text; they carry the labeler's errors on both sides of the comparison.
- Reports may name sides, sizes and devices that the image does not show, and comparisons with prior images that
  the model has never seen.
- There is no check that an uploaded image is a chest radiograph.
"""
_SMALL_LIMIT = (
    "- The small encoder was pretrained on the labels, kinds and masks of {images:,} images of other phantoms: it has "
    "been told more than ImageNet tells an encoder.\n"
)
_MASKED_LIMIT = (
    "- The small encoder was pretrained on {images:,} images of other phantoms by filling in what was hidden; it "
    "was told of no finding.\n"
)
_PHANTOM_LIMIT = "- Trained on synthetic phantoms: it knows nothing about real patients.\n"


def model_card(
    records: Sequence[Mapping], profile: Profile, dataset: str, train_studies: int, connector_name: str
) -> str:
    """Markdown: what the model is, what it may be used for, how it scored, what it cannot do."""
    count = max((row["n"] for row in records if row["task"] == "report" and row["unit"] == "study"), default=0)
    parts = [
        f"# LightMedVLM, profile `{profile.name}`, data set `{dataset}`",
        f"**{NOT_FOR_CLINICAL_USE}**",
        "## Model",
        f"Vision encoder `{profile.vision}` ({profile.image_size} pixels), connector `{connector_name}`, language "
        f"model `{profile.language_model}` with LoRA of rank {profile.lora_rank}. It writes a chest X-ray report "
        "and answers yes/no questions about 14 observations.",
        "## Intended use",
        "Teaching and research on vision-language models. Not for decisions about patients.",
        "## Data",
        f"Training split of `{dataset}`: {train_studies:,} studies, balanced before stages 2 and 3. Evaluated on "
        f"{count:,} held-out studies; no patient is in both.",
        "## Results",
        "Intervals: 95 %, bootstrap over patients. Unless a table says otherwise: words in lower case without "
        "punctuation and headings, whole references, one per study.",
        *(_table(records, *table) for table in _TABLES),
        "## Limits",
        _limits(profile, dataset),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _limits(profile: Profile, dataset: str) -> str:
    text = _LIMITS.format(clinical=NOT_FOR_CLINICAL_USE) + (_PHANTOM_LIMIT if dataset == "phantom" else "")
    if profile.vision not in SHIPPED_BACKBONES["vision"]:
        return text
    shipped = json.loads((SHIPPED_BACKBONES["vision"][profile.vision] / "config.json").read_text(encoding="utf-8"))
    images = sum(run["training_images"] for run in shipped["pretraining"]["runs"])
    told = "held_out_auroc" in shipped["pretraining"]
    return text + (_SMALL_LIMIT if told else _MASKED_LIMIT).format(images=images)


def record_table(
    records: Sequence[Mapping], task: str, section: str, titles: Mapping[str, str], protocol: str = PROTOCOL
) -> pd.DataFrame:
    """The chosen records as a table of texts "0.71 (0.68 to 0.74)": a row per system, a column per metric of `titles`
    that is there. Paired differences have a table of their own."""
    cells: dict[str, dict[str, str]] = {}
    for row in records:
        here = (row["task"], row["section"], row["protocol"]) == (task, section, protocol)
        if here and row["metric"] in titles and MINUS not in row["system"]:
            cells.setdefault(row["system"], {})[titles[row["metric"]]] = format_record(row)
    table = pd.DataFrame.from_dict(cells, orient="index").fillna("–")
    return table[[title for title in titles.values() if title in table]]


def comparison_table(
    records: Sequence[Mapping], task: str, section: str, titles: Mapping[str, tuple[str, str]]
) -> pd.DataFrame:
    """The paired differences among the records, a row per pair of systems, as texts "+0.03 (-0.01 to 0.06), p 0.12".

    `titles`: metric -> (column title, protocol).
    """
    here = [row for row in records if MINUS in row["system"] and (row["task"], row["section"]) == (task, section)]
    by_key = {(row["system"], row["metric"], row["protocol"]): row for row in here}
    cells: dict[str, dict[str, str]] = {}
    for (system, metric, protocol), row in by_key.items():
        if titles.get(metric, ("", ""))[1] == protocol:
            text = format_record(row)
            signed = f"+{text}" if (row["value"] or 0) > 0 else text
            p = by_key[system, f"{metric}_p", protocol]["value"]
            shown = "" if p is None else f", p {p:.3f}"
            cells.setdefault(system.replace(MINUS, " - "), {})[titles[metric][0]] = signed + shown
    return pd.DataFrame.from_dict(cells, orient="index").fillna("–")


def _table(records: Sequence[Mapping], heading: str, where: tuple[str, str, str], titles: dict[str, str]) -> str:
    """One Markdown table, a row per system; empty where the run has no such records."""
    task, section, protocol = where
    table = record_table(records, task, section, titles, protocol)
    if table.empty:
        return ""
    lines = ["| system | " + " | ".join(table.columns) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [f"| {system} | " + " | ".join(row) + " |" for system, row in zip(table.index, table.values, strict=True)]
    return f"### {heading}\n\n" + "\n".join(lines)


def format_record(row: Mapping | None) -> str:
    """ "0.71 (0.68 to 0.74)"; a dash where there is no such number."""
    if row is None or row["value"] is None:
        return "–"
    if row["low"] is None:
        return f"{row['value']:.2f}"
    return f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
