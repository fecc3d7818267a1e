"""Several runs beside each other: their systems on the same studies, or the same systems over several seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import outputs_root

STEP = "07_evaluation"


class Run(NamedTuple):
    """A finished evaluation: the parameters it was made with, its records and the reports it scored."""

    name: str
    parameters: dict
    records: list[dict]
    predictions: pd.DataFrame  # subject_id, study_id and a column of reports per system


def read_run(name: str) -> Run:
    """The evaluation of run `name` below outputs/; raises UserError where there is none."""
    folder = outputs_root() / name / STEP
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        records = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        predictions = pd.read_csv(folder / "predictions.csv", keep_default_na=False)
    except FileNotFoundError as error:
        raise UserError(
            f"Run {name!r} has no finished evaluation ({Path(error.filename).name} is missing in {folder}); "
            f"run `lightmedvlm run --run-name {name} --to 07` first."
        ) from None
    return Run(name, manifest["parameters"], records, predictions)


def reports_of_runs(runs: Sequence[Run], study_ids: Sequence[int]) -> dict[str, list[str]]:
    """Reports of the other runs' systems about these studies, `{"system (run)": reports}`, in the order of `study_ids`.

    A run on other studies (another seed's phantoms, another data set) has none; a run on some of them neither, since
    only systems that are scored on the same studies can be compared.
    """
    found = {}
    for run in runs:
        if set(study_ids) <= set(run.predictions["study_id"]):
            rows = run.predictions.set_index("study_id").loc[list(study_ids)]
            for system in rows.columns.drop("subject_id"):
                found[f"{system} ({run.name})"] = rows[system].tolist()
    return found


def over_runs(runs: Sequence[Run], metrics: Sequence[tuple[str, str, str, str]]) -> pd.DataFrame:
    """Each system's metrics over runs that differ in their seed: mean, standard deviation and number of runs.

    `metrics`: (task, metric, section, protocol) of the records. Index: system, metric; only systems in all the runs.
    """
    rows = []
    for run in runs:
        for record in run.records:
            key = (record["task"], record["metric"], record["section"], record["protocol"])
            if key in metrics and record["value"] is not None:
                rows.append((record["system"], record["metric"], run.name, record["value"]))
    table = pd.DataFrame(rows, columns=["system", "metric", "run", "value"])
    summary = table.groupby(["system", "metric"], sort=False)["value"].agg(["mean", "std", "count"])
    return summary[summary["count"] == len(runs)]
