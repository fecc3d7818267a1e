"""Run the course headless: the notebooks in order, each with checked parameters, skipping what is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightmedvlm_utils.config import Profile
from lightmedvlm_utils.course.kernel import NotebookFailed, execute
from lightmedvlm_utils.course.lessons import Notebook, checked_data_root, discover, resolve_parameters, select
from lightmedvlm_utils.course.steps import check_run, lock, read_manifest, run_folder, take_over, why_stale
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import project_root, write_json
from lightmedvlm_utils.settings import changes, describe, load_plugins, resolve

RECORD = "run.json"
_METRICS_SHOWN = 3
_REASONS_SHOWN = 4


@dataclass
class StepRecord:
    """One line of the final table and of `run.json`; seconds and memory are those of the run that did the step."""

    name: str
    status: str  # "done", "kept" (skipped, up to date), "refused", "failed" or "stopped" (SIGTERM)
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
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
    parameters: Mapping[str, Any] | None = None,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
    dry: bool = False,
    say: Callable[..., None] = print,
    donors: Sequence[Path] = (),
) -> dict[str, Any]:
    """Execute the notebooks `first` to `last` into `outputs/<run>/` and return what `run.json` records of them.

    `donors` are folders of other runs, whose results are taken over as far as they are this run's too.

    With `dry` nothing is executed: the record's `plan` says what would be. Everything that can be checked beforehand
    is: names, types and ranges of all parameters and settings, profile, data set, connectors, and that nobody else is
    at work in the run's folder. Raises UserError for those, and NotebookFailed at the first notebook that stops.
    """
    resolved = resolve(profile, settings)
    if seed < 0:
        raise UserError(f"The seed is {seed}, but must be 0 or larger; choose another one.")
    shared: dict[str, Any] = dict(
        profile=profile,
        dataset=dataset,
        data_root=checked_data_root(dataset, data_root),
        run_name=run_name,
        seed=seed,
        force=force,
        settings=changes(resolved),
    )
    notebooks = select(discover(project_root() / "notebooks"), first, last)
    values = resolve_parameters(notebooks, shared, parameters or {})
    _check_connectors(resolved, parameters or {}, values)
    folder = run_folder(run_name, profile)
    check_run(folder, profile, dataset)
    record: dict[str, Any] = dict(shared, parameters=dict(parameters or {}), steps=[])
    if dry:
        return _announce(record, notebooks, values, folder, resolved, say, everything=True)
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)  # fails now rather than after the first notebook
    held = lock(folder, ".lock", "A run")
    try:
        taken = take_over(folder, donors, values)
        if taken:
            say(f"taken over from other runs: {', '.join(taken)}")
        _announce(record, notebooks, values, folder, resolved, say)
        return _execute_all(record, notebooks, values, folder, say)
    finally:
        held.release()


def _announce(
    record: dict[str, Any],
    notebooks: Sequence[Notebook],
    values: Mapping[str, dict[str, Any]],
    folder: Path,
    resolved: Profile,
    say: Callable[..., None],
    everything: bool = False,
) -> dict[str, Any]:
    """Say what the run is and which earlier results it redoes (`everything`: also what has no result yet)."""
    what = f"{len(notebooks)} notebooks, profile {resolved.name}, data set {record['dataset']}"
    say(f"Run {folder.name}: {what}, in {folder}")
    for line in describe(resolved):
        say(f"  setting {line}")
    record["plan"] = _plan(notebooks, values, folder, _earlier_steps(folder))
    for step in record["plan"]:
        if step["reasons"] and (everything or (folder / step["name"]).is_dir()):
            say(_plan_line(step))
    return record


def _execute_all(
    record: dict[str, Any],
    notebooks: Iterable[Notebook],
    values: Mapping[str, dict[str, Any]],
    folder: Path,
    say: Callable[..., None],
) -> dict[str, Any]:
    """Execute what is to be done, and keep the books in `run.json`."""
    record["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    before = _earlier_steps(folder)
    try:
        for notebook in notebooks:
            step = _run_step(notebook, values[notebook.name], folder, before, say)
            record["steps"].append(asdict(step))
            done = {own["name"]: own for own in record["steps"]}
            merged = before | done  # a run of some steps does not forget the others
            write_json(folder / RECORD, record | {"steps": [merged[name] for name in sorted(merged)]})
            if step.error:
                raise NotebookFailed(step.error, step.status == "refused", step.status == "stopped")
    finally:
        if record["steps"]:
            say("\n" + format_table(record["steps"]))
    return record


def _check_connectors(resolved: Profile, parameters: Mapping[str, Any], values: Mapping[str, dict[str, Any]]) -> None:
    """Refuse unknown connectors and options of theirs. The defaults are right, and asking costs importing torch."""
    load_plugins(resolved.plugins)
    changed = {"num_queries", "connector_options"} & set(changes(resolved))
    if "connectors" in parameters or changed:
        from lightmedvlm_utils.model.connectors import check_options

        named = {name for own in values.values() for name in own.get("connectors", [])}
        for name in sorted(named | set(resolved.connector_options)):
            check_options(name, resolved)


def _earlier_steps(folder: Path) -> dict[str, dict[str, Any]]:
    """What `run.json` says of steps that earlier runs did, by name; empty where there is none that can be read."""
    try:
        return {step["name"]: step for step in json.loads((folder / RECORD).read_text(encoding="utf-8"))["steps"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _plan(
    notebooks: Iterable[Notebook], values: Mapping[str, dict[str, Any]], folder: Path, before: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """For each step whether it will be redone, why, and what it cost last time: `{name, reasons, seconds}`."""
    planned: list[dict[str, Any]] = []
    redone: set[str] = set()
    for notebook in notebooks:
        name, parameters = notebook.name, values[notebook.name]
        manifest = read_manifest(folder, name)
        reasons = ["--force"] if parameters.get("force") else why_stale(folder, name, parameters)
        if not reasons and manifest:
            reasons = [f"{upstream} is redone" for upstream in manifest["made_from"]["inputs"] if upstream in redone]
        if reasons:
            redone.add(name)
        seconds = before.get(name, {}).get("seconds") or (manifest["seconds"] if manifest else 0.0)
        planned.append({"name": name, "reasons": reasons, "seconds": seconds})
    return planned


def _plan_line(step: Mapping[str, Any]) -> str:
    cost = f" ({step['seconds']:.0f} s last time)" if step["seconds"] else ""
    reasons = step["reasons"]
    more = f" and {len(reasons) - _REASONS_SHOWN} more" if len(reasons) > _REASONS_SHOWN else ""
    return f"  redo {step['name']}{cost}: {', '.join(reasons[:_REASONS_SHOWN])}{more}"


def _run_step(
    notebook: Notebook, parameters: dict[str, Any], folder: Path, before: Mapping[str, Any], say: Callable[..., None]
) -> StepRecord:
    """Execute or skip one notebook, with its line of progress."""
    copy = folder / "notebooks" / notebook.path.name
    step = StepRecord(notebook.name, "kept", folder=str(folder / notebook.name))
    say(f"{notebook.name} ... ", end="", flush=True)
    if not parameters.get("force") and not why_stale(folder, notebook.name, parameters):
        manifest = read_manifest(folder, notebook.name) or {}
        earlier = before.get(notebook.name, {})
        step.metrics = manifest.get("metrics", {})
        step.seconds = earlier.get("seconds") or manifest.get("seconds", 0.0)
        step.peak_memory_mb = earlier.get("peak_memory_mb", 0.0)
        say(f"up to date; {format_metrics(step.metrics)}".rstrip("; "))
        return step
    started = time.monotonic()
    try:
        execution = execute(notebook.path, copy, copy.with_suffix(".log"), parameters)
    except NotebookFailed as failure:
        step.status = {1: "failed", 2: "refused"}.get(failure.exit_code, "stopped")
        say(step.status)
        step.error = str(failure)
        step.seconds = round(time.monotonic() - started, 1)
        return step
    except BaseException:  # a full disk, Ctrl-C: end the line before the message
        say("stopped")
        raise
    step.status, step.metrics = "done", (read_manifest(folder, notebook.name) or {}).get("metrics", {})
    step.seconds, step.peak_memory_mb = execution.seconds, execution.peak_memory_mb
    say(f"{step.seconds:.0f} s, {step.peak_memory_mb:.0f} MB; {format_metrics(step.metrics)}".rstrip("; "))
    return step


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The first few single values of a manifest's metrics, for one line."""
    values = [(name, value) for name, value in metrics.items() if isinstance(value, int | float | str)]
    texts = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values)
    return ", ".join(list(texts)[:_METRICS_SHOWN])


def format_table(steps: Iterable[Mapping[str, Any]]) -> str:
    """The table at the end of a run: what each step took (kept ones: last time), gave and where its files lie."""
    rows = [("step", "status", "seconds", "peak memory", "key metrics", "folder")]
    for step in steps:
        rows.append(
            (
                step["name"],
                step["status"],
                f"{step['seconds']:.1f}" if step["seconds"] else "-",
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
