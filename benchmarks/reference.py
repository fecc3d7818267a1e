"""Take finished runs as the reference: copy their metrics and figures to `outputs/reference/`, and write the README's
tables from them.

    python benchmarks/reference.py outputs/laptop                   # the course as it comes
    python benchmarks/reference.py outputs/laptop outputs/others    # and a run of the other connectors, trained alike
    python benchmarks/reference.py outputs/stages                   # or what `lightmedvlm ablate` has made

`tests/test_readme.py` proves that the README says what `outputs/reference/` says.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from lightmedvlm_utils.evaluation.modelcard import format_record

ROOT = Path(__file__).resolve().parents[1]
REFERENCE, README = ROOT / "outputs/reference", ROOT / "README.md"
FIGURES = {
    "views.png": "00_setup_and_tour",
    "attention.png": "07_evaluation",
    "report_metrics.png": "07_evaluation",
}
# system -> (name, the image it has seen, what it has learned from beside images)
SYSTEMS = {
    "sasa": ("SASA", "the patient's", "reports, labels"),
    "sasa_stage3": ("SASA after stage 3 (the final model)", "the patient's", "reports, labels, questions"),
    "mlp": ("plain projector", "the patient's", "reports"),
    "finding_neighbour": ("training report of the most similar findings by SASA", "the patient's", "labels"),
    "nearest_neighbour": ("report of the most similar training image", "the patient's", "nothing"),
    "shuffled_image": ("SASA, image of another patient", "another patient's", "reports, labels"),
    "blind": ("SASA, average of the training images", "none", "reports, labels"),
    "most_frequent": ("most frequent training report or answer", "none", "reports"),
    "text_only": ("classifier of the question's words", "none", "questions"),
}
REPORT_PROTOCOL = "study_uncertain_positive"
WHOLE = "findings+impression"
# (task, metric, section, title) of the rows of the table of questions
KINDS = (
    ("vqa", "balanced_accuracy", "presence", "presence, yes/no"),
    ("vqa", "balanced_accuracy", "negated", "those that ask for the absence"),
    ("vqa", "balanced_accuracy", "normality", "normality, yes/no"),
    ("vqa", "balanced_accuracy", "side", "side, yes/no"),
    ("vqa", "balanced_accuracy", "device", "device of a kind, yes/no"),
    ("vqa_open", "accuracy", "side", "side, open"),
    ("vqa_open", "accuracy", "zone", "zone, open"),
    ("vqa_open", "accuracy", "severity", "severity, open"),
    ("vqa_open", "accuracy", "view", "view, open"),
    ("vqa_open", "item_f1", "device", "devices, as a list (F1)"),
    ("vqa_open", "accuracy", "count", "count, open"),
)
Record = dict[str, Any]


def find(records: list[Record], system: str, task: str, metric: str, section: str, protocol: str = "") -> Record | None:
    """The one record of that description, or None: not every system does every task."""
    wanted = {"system": system, "task": task, "metric": metric, "section": section}
    if protocol:
        wanted["protocol"] = protocol
    return next((row for row in records if all(row[key] == value for key, value in wanted.items())), None)


def table(records: list[Record]) -> str:
    """The README's results in Markdown, from the tidy records of `metrics.json`."""
    scores = ("label macro-F1", "fact F1", "side right", "BLEU-4", "yes/no balanced accuracy")
    columns = ("system", "image seen", "learned from", *scores)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for system, about in SYSTEMS.items():
        cells = (
            find(records, system, "report", "label_macro_f1", WHOLE, REPORT_PROTOCOL),
            find(records, system, "report", "fact_f1", WHOLE),
            find(records, system, "report", "side_right", WHOLE),
            find(records, system, "report", "bleu_4", WHOLE),
            find(records, system, "vqa", "balanced_accuracy", "all questions"),
        )
        lines.append(f"| {' | '.join((*about, *map(format_record, cells)))} |")
    return "\n".join(lines)


def kinds(folder: Path = REFERENCE) -> str:
    """Questions by kind beside their baselines, in Markdown."""
    records = json.loads((folder / "metrics.json").read_text())
    columns = {
        "sasa": "SASA",
        "sasa_held_out_words": "in held-out words",
        "shuffled_image": "another patient's image",
        "nearest_neighbour": "nearest neighbor",
        "text_only": "question's words",
    }
    lines = ["| questions | n | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for task, metric, section, title in KINDS:
        cells = [find(records, system, task, metric, section) for system in columns]
        if cells[0]:
            lines.append(f"| {title} | {cells[0]['n']} | {' | '.join(map(format_record, cells))} |")
    return "\n".join(lines)


def crash(folder: Path = REFERENCE) -> str:
    """The crash test of the metrics in Markdown, as `benchmarks/crash_test.py --csv` leaves it: shares noticed."""
    table = pd.read_csv(folder / "crash_test.csv", index_col=0)
    lines = ["| planted error | " + " | ".join(table.columns) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [
        f"| {error} | {' | '.join(f'{v:.2f}' for v in row)} |"
        for error, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return "\n".join(lines)


def caption(records: list[Record], run: Record) -> str:
    reports = find(records, "sasa", "report", "label_macro_f1", WHOLE, REPORT_PROTOCOL)
    questions = find(records, "sasa", "vqa", "balanced_accuracy", "all questions")
    assert reports and questions, "the run has no figures of SASA"
    return (
        f"Measured on {reports['n']} held-out phantom studies and {questions['n']:,} questions about them (95 % "
        f"bootstrap intervals by patient); the run took {run['minutes']:.0f} minutes on {run['cores']} CPU cores and "
        f"{run['peak_memory_gb']:.1f} GB of memory:"
    )


def results(folder: Path = REFERENCE) -> str:
    records, run = (json.loads((folder / name).read_text()) for name in ("metrics.json", "run.json"))
    return f"{caption(records, run)}\n\n{table(records)}"


def connectors(folder: Path = REFERENCE) -> str:
    """The connectors of one run side by side, in Markdown."""
    columns = (
        "tokens",
        "parameters",
        "learns from labels",
        "label macro-F1 of the reports",
        "yes/no balanced accuracy",
    )
    lines = ["| connector | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in json.loads((folder / "connectors.json").read_text()):
        cells = (row["tokens"], f"{row['parameters']:,}", row["learns from labels"])
        scores = (format_record(row["report"]), format_record(row["vqa"]))
        lines.append(f"| {row['connector']} | " + " | ".join(map(str, (*cells, *scores))) + " |")
    return "\n".join(lines)


# Figures of an ablation that the README shows, by their titles.
ABLATED = {
    "label_f1": "label macro-F1",
    "fact_f1": "fact F1",
    "side_right": "side right",
    "contradictions": "contradict themselves",
    "auroc": "AUROC",
    "pointing_game": "pointing game",
    "vqa": "yes/no balanced accuracy",
}


def ablation(name: str) -> str:
    """An ablation in Markdown: mean and sd over the seeds; bold what differs from the first arm."""
    records = json.loads((REFERENCE / "ablations" / f"{name}.json").read_text())
    shown = [figure for figure in ABLATED if any(record["figure"] == figure for record in records)]
    seeds = len(records[0]["seeds"])
    lines = [
        f"| {records[0]['split']} split, {seeds} seeds | " + " | ".join(ABLATED[figure] for figure in shown) + " |"
    ]
    lines.append("|---" * (len(shown) + 1) + "|")
    for arm in dict.fromkeys(record["arm"] for record in records):
        found = {record["figure"]: record for record in records if record["arm"] == arm}
        lines.append(f"| {arm} | {' | '.join(_ablated(found.get(figure)) for figure in shown)} |")
    return "\n".join(lines)


def _ablated(record: Record | None) -> str:
    if record is None:
        return "–"
    text = f"{record['mean']:.3f}" + ("" if record["sd"] is None else f" ± {record['sd']:.3f}")
    differs = record.get("low") is not None and (record["low"] > 0 or record["high"] < 0)
    return f"**{text}**" if differs else text


def ablations() -> dict[str, Callable[[], str]]:
    """A block for every ablation that was taken."""
    names = sorted(path.stem for path in (REFERENCE / "ablations").glob("*.json"))
    return {f"ablation {name}": partial(ablation, name) for name in names}


BLOCKS = {"reference": results, "connectors": connectors, "questions": kinds, "crash": crash, **ablations()}


def fill(readme: str) -> str:
    """The README with every block made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = readme.partition(begin)
        if not found:
            sys.exit(f"The README has no {begin}; say there where the table belongs.")
        readme = f"{before}{begin}\n{make()}\n{end}" + rest.partition(end)[2]
    return readme


def timing(folder: Path) -> Record:
    """Minutes, cores and peak memory of a run, from its `run.json`: of each step, of the run that did it."""
    steps = json.loads((folder / "run.json").read_text())["steps"]
    if any(step["status"] not in ("done", "kept") or not step["seconds"] for step in steps):
        sys.exit(f"{folder} has steps that failed or were never timed; take a run that did them all (`--force`).")
    return {
        "minutes": round(sum(step["seconds"] for step in steps) / 60, 1),
        "cores": os.cpu_count(),
        "peak_memory_gb": round(max(step["peak_memory_mb"] for step in steps) / 1000, 1),
        "steps": {step["name"]: step["seconds"] for step in steps},
    }


def take(folder: Path) -> None:
    """Metrics, figures and times of the course as it comes; of the phantom alone, since what lies there is public."""
    dataset = json.loads((folder / "07_evaluation/manifest.json").read_text())["parameters"]["dataset"]
    if dataset != "phantom":
        sys.exit(f"{folder} is a run on {dataset!r}: nothing of it may be published.")
    REFERENCE.mkdir(parents=True, exist_ok=True)
    records = json.loads((folder / "07_evaluation/metrics.json").read_text())
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)  # one a line, to be compared
    (REFERENCE / "metrics.json").write_text(f"[\n{lines}\n]\n")
    for name, step in FIGURES.items():
        shutil.copy(folder / step / name, REFERENCE / name)
    (REFERENCE / "run.json").write_text(json.dumps(timing(folder), indent=1) + "\n")


def take_connectors(folders: list[Path]) -> None:
    """What each connector costs and brings, over runs of the same profile, settings and seed."""
    found: dict[str, Record] = {}
    for folder in folders:
        evaluation = folder / "07_evaluation"
        records = json.loads((evaluation / "metrics.json").read_text())
        names = json.loads((evaluation / "manifest.json").read_text())["parameters"]["connectors"]
        for name, row in zip(names, pd.read_csv(evaluation / "connectors.csv").to_dict("records"), strict=True):
            report = find(records, name, "report", "label_macro_f1", WHOLE, REPORT_PROTOCOL)
            vqa = find(records, name, "vqa", "balanced_accuracy", "all questions")
            found.setdefault(name, {**row, "report": report, "vqa": vqa})
    (REFERENCE / "connectors.json").write_text(json.dumps(list(found.values()), indent=1) + "\n")


def take_ablation(folder: Path) -> None:
    """Its records and its figure."""
    target = REFERENCE / "ablations"
    target.mkdir(exist_ok=True)
    for source, kind in (("ablation.json", "json"), ("ablation.png", "png")):
        shutil.copy(folder / source, target / f"{folder.name}.{kind}")


def main(folders: list[Path]) -> None:
    runs = [folder for folder in folders if not (folder / "ablation.json").exists()]
    for folder in folders:
        if folder not in runs:
            take_ablation(folder)
    if runs:
        take(runs[0])
    if len(runs) > 1:
        take_connectors(runs)
    BLOCKS.update(ablations())
    README.write_text(fill(README.read_text()))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
