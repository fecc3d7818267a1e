"""Run the course headless: the notebooks in order, each with checked parameters, skipping what is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightmedvlm_utils import runs
from lightmedvlm_utils.config import get_profile
from lightmedvlm_utils.execution import NotebookFailed, execute
from lightmedvlm_utils.lessons import Notebook, checked_data_root, discover, resolve_parameters, select

_METRICS_SHOWN = 3


@dataclass
class StepRecord:
    """One line of the final table and of `run.json`."""

    name: str
    status: str  # "done", "kept" (skipped, up to date) or "failed"
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    metrics: dict = field(default_factory=dict)
    folder: str = ""
    error: str = ""


def run_course(
    profile: str = "laptop",
    dataset: str = "phantom",
    data_root: str = "",
    run_name: str = "",
    seed: int = 0,
    first: str = "",
    last: str = "",
    parameters: dict | None = None,
    force: bool = False,
    say: Callable[..., None] = print,
) -> dict:
    """Execute the notebooks `first` to `last` into `outputs/<run>/` and return what `run.json` records.

    Everything that can be checked beforehand is: names and types of all parameters, profile, data set. Raises
    UserError for those, and NotebookFailed at the first notebook that stops.
    """
    get_profile(profile)
    shared = dict(
        profile=profile,
        dataset=dataset,
        data_root=checked_data_root(dataset, data_root),
        run_name=run_name,
        seed=seed,
        force=force,
    )
    notebooks = select(discover(runs.project_root() / "notebooks"), first, last)
    values = resolve_parameters(notebooks, shared, parameters or {})
    folder = runs.run_folder(run_name, profile)
    record = dict(shared, parameters=parameters or {}, started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), steps=[])
    say(f"Run {folder.name}: {len(notebooks)} notebooks, profile {profile}, data set {dataset}, in {folder}")
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)  # fails now rather than after the first notebook
    try:
        for notebook in notebooks:
            step = _run_step(notebook, values[notebook.name], folder, say)
            record["steps"].append(asdict(step))
            runs.write_json(folder / "run.json", record)
            if step.error:
                raise NotebookFailed(step.error, expected=step.status == "refused")
    finally:
        if record["steps"]:
            say("\n" + format_table(record["steps"]))
    return record


def _run_step(notebook: Notebook, parameters: dict, folder: Path, say: Callable[..., None]) -> StepRecord:
    """Execute or skip one notebook, with its line of progress."""
    copy = folder / "notebooks" / notebook.path.name
    step = StepRecord(notebook.name, "kept", folder=str(folder / notebook.name))
    say(f"{notebook.name} ... ", end="", flush=True)
    if not parameters.get("force") and is_done(notebook, parameters, folder, copy):
        step.metrics = _metrics(folder, notebook.name)
        say(f"up to date; {format_metrics(step.metrics)}".rstrip("; "))
        return step
    started = time.monotonic()
    try:
        execution = execute(notebook.path, copy, copy.with_suffix(".log"), parameters)
    except NotebookFailed as failure:
        say("failed")
        step.status, step.error = ("refused" if failure.expected else "failed"), str(failure)
        step.seconds = round(time.monotonic() - started, 1)
        return step
    except BaseException:  # a full disk, Ctrl-C: end the line before the message
        say("stopped")
        raise
    step.status, step.metrics = "done", _metrics(folder, notebook.name)
    step.seconds, step.peak_memory_mb = execution.seconds, execution.peak_memory_mb
    say(f"{step.seconds:.0f} s, {step.peak_memory_mb:.0f} MB; {format_metrics(step.metrics)}".rstrip("; "))
    return step


def is_done(notebook: Notebook, parameters: dict, folder: Path, copy: Path) -> bool:
    """Whether a notebook's results are there for these parameters.

    The manifest decides. A notebook that leaves none (the demo) is done when its executed copy is: same
    parameters, no error, younger than the notebook and than every manifest of the run.
    """
    if runs.read_manifest(folder, notebook.name) is not None:
        return runs.is_current(folder, notebook.name, parameters)
    if not copy.exists():
        return False
    try:
        executed = json.loads(copy.read_text(encoding="utf-8"))["metadata"]["papermill"]
    except (ValueError, KeyError):  # cut off by a crash
        return False
    sources = [notebook.path, *folder.glob(f"*/{runs.MANIFEST}")]
    fresh = copy.stat().st_mtime >= max(source.stat().st_mtime for source in sources)
    return fresh and not executed["exception"] and executed["parameters"] == parameters


def _metrics(folder: Path, name: str) -> dict:
    manifest = runs.read_manifest(folder, name)
    return manifest["metrics"] if manifest else {}


def format_metrics(metrics: dict) -> str:
    """The first few single values of a manifest's metrics, for one line."""
    values = [(name, value) for name, value in metrics.items() if isinstance(value, int | float | str)]
    texts = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values)
    return ", ".join(list(texts)[:_METRICS_SHOWN])


def format_table(steps: list[dict]) -> str:
    """The table at the end of a run: what each step took, gave and where its files lie."""
    rows = [("step", "status", "seconds", "peak memory", "key metrics", "folder")]
    for step in steps:
        ran = step["status"] != "kept"
        rows.append(
            (
                step["name"],
                step["status"],
                f"{step['seconds']:.1f}" if ran else "-",
                f"{step['peak_memory_mb']:.0f} MB" if step["peak_memory_mb"] else "-",
                format_metrics(step["metrics"]) or "-",
                _short_path(step["folder"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _short_path(path: str) -> str:
    """`path` relative to the working directory where that is shorter."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
