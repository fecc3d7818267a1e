"""Take a finished run as the reference: copy its metrics and figures to `outputs/reference/`, and write the README's
table of results from them.

    python benchmarks/reference.py outputs/laptop

`tests/test_readme.py` proves that the README says what `outputs/reference/metrics.json` says.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE, README = ROOT / "outputs/reference", ROOT / "README.md"
BEGIN, END = "<!-- reference -->", "<!-- /reference -->"
FIGURES = {
    "views.png": "00_setup_and_tour",
    "attention.png": "07_evaluation",
    "report_metrics.png": "07_evaluation",
}
SYSTEMS = {
    "sasa": "SASA",
    "sasa_stage3": "SASA after stage 3 (the final model)",
    "mlp": "plain projector",
    "shuffled_image": "SASA, image of another patient",
    "blind": "SASA, average of the training images",
    "nearest_neighbour": "report of the most similar training image",
    "most_frequent": "most frequent training report",
}
REPORT_PROTOCOL = "lightmedvlm_uncertain_positive"


def find(records: list[dict], system: str, task: str, metric: str, section: str, protocol: str | None = None) -> dict:
    """The one record of that description, or an empty one: not every system does every task."""
    wanted = {"system": system, "task": task, "metric": metric, "section": section}
    if protocol:
        wanted["protocol"] = protocol
    found = [record for record in records if all(record[key] == value for key, value in wanted.items())]
    return found[0] if found else {}


def cell(record: dict) -> str:
    return f"{record['value']:.2f} ({record['low']:.2f} to {record['high']:.2f})" if record else "–"


def table(records: list[dict]) -> str:
    """The README's results in Markdown, from the tidy records of `metrics.json`."""
    lines = ["| system | label macro-F1 of the reports | BLEU-4 | yes/no balanced accuracy |", "|---|---|---|---|"]
    whole = "findings+impression"
    for system, name in SYSTEMS.items():
        cells = (
            find(records, system, "report", "label_macro_f1", whole, REPORT_PROTOCOL),
            find(records, system, "report", "bleu_4", whole),
            find(records, system, "vqa", "balanced_accuracy", "all questions"),
        )
        lines.append(f"| {name} | {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)


def caption(records: list[dict], run: dict) -> str:
    reports = find(records, "sasa", "report", "label_macro_f1", "findings+impression", REPORT_PROTOCOL)["n"]
    questions = find(records, "sasa", "vqa", "balanced_accuracy", "all questions")["n"]
    return (
        f"Measured on {reports} held-out phantom studies and {questions:,} questions about them (95 % bootstrap "
        f"intervals by patient); the run took {run['minutes']:.0f} minutes on {run['cores']} CPU cores and "
        f"{run['peak_memory_gb']:.1f} GB of memory:"
    )


def block(records: list[dict], run: dict) -> str:
    return f"{BEGIN}\n{caption(records, run)}\n\n{table(records)}\n{END}"


def timing(folder: Path) -> dict:
    """Minutes, cores and peak memory of a run that did every step, from its `run.json`."""
    steps = json.loads((folder / "run.json").read_text())["steps"]
    if any(step["status"] != "done" for step in steps):
        sys.exit(f"{folder} skipped some steps in its last run; take a run that did them all (`--force`).")
    return {
        "minutes": round(sum(step["seconds"] for step in steps) / 60, 1),
        "cores": os.cpu_count(),
        "peak_memory_gb": round(max(step["peak_memory_mb"] for step in steps) / 1000, 1),
        "steps": {step["name"]: step["seconds"] for step in steps},
    }


def main(folder: Path) -> None:
    run = timing(folder)
    REFERENCE.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "07_evaluation/metrics.json", REFERENCE / "metrics.json")
    for name, step in FIGURES.items():
        shutil.copy(folder / step / name, REFERENCE / name)
    (REFERENCE / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    records = json.loads((REFERENCE / "metrics.json").read_text())
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + block(records, run) + rest.partition(END)[2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
