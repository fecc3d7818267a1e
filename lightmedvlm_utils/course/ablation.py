"""Ablations: the same course with one thing changed, over several seeds, compared as pairs.

A YAML file names the arms; `lightmedvlm ablate FILE` trains each with each seed in a run folder of its own, takes over
from the others' runs what their changes do not touch, measures all alike, and writes one table and one figure. What is
done is kept, so an interrupted ablation goes on where it was. It is measured on the validation split unless the file
says `split: test`: settings are chosen on the first, and the second is read once, at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightmedvlm_utils.config import check_dataset, get_profile
from lightmedvlm_utils.course import fingerprint
from lightmedvlm_utils.course.lessons import discover, resolve_parameters, select
from lightmedvlm_utils.course.runner import run_course
from lightmedvlm_utils.course.steps import lock, manifests, read_manifest, read_step, run_folder
from lightmedvlm_utils.errors import UserError, no_such
from lightmedvlm_utils.files import atomic_path, digest, project_root, write_json, write_text
from lightmedvlm_utils.settings import flat, load_plugins, parse_yaml, resolve

LAST_SHARED = "03"  # up to here a run holds all connectors, so that arms differ from 04 on
STAGE_NOTEBOOKS = {"04": 1, "05": 2, "06": 3}
SPLITS = ("validate", "test")
RECORD, TABLE, FIGURE = "ablation.json", "table.csv", "ablation.png"


@dataclass(frozen=True)
class Arm:
    """One way to train: what differs from the course as it is."""

    name: str
    connector: str = "sasa"
    last: str = "06"  # the notebook of the last training stage that it goes through: "04", "05" or "06"
    settings: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)  # of notebooks, like "strategy"


@dataclass(frozen=True)
class Ablation:
    """The first arm is the one that the others are compared with."""

    name: str
    arms: tuple[Arm, ...]
    profile: str = "laptop"
    dataset: str = "phantom"
    data_root: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "validate"
    baselines: bool = False  # also retrieval, and the usual place of findings

    def run_name(self, arm: Arm, seed: int) -> str:
        return f"{self.name}-{_plain(arm.name)}-{seed}"


def read_ablation(path: Path | str) -> Ablation:
    """The ablation that a YAML file describes; raises UserError that names what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"The ablation {path} cannot be read ({reason}); check its name.") from error
    given = parse_yaml(text, f"The ablation {path} is")
    shared = flat(given.pop("settings", {}) or {})
    defaults = {str(name): given.pop(name) for name in ("connector", "last") if name in given}
    described = given.pop("arms", None)
    if not isinstance(described, dict) or len(described) < 1:
        raise UserError(f"The ablation {path} has no arms; give `arms:` with a name and what it changes for each.")
    arms = tuple(_arm(str(name), values or {}, shared, defaults) for name, values in described.items())
    known = [one.name for one in fields(Ablation) if one.name != "arms"]
    _check_keys(given, [*known, "connector", "last", "settings", "arms"], f"The ablation {path}")
    ablation = _typed({"name": Path(path).stem, **given, "arms": arms}, path)
    _check(ablation)
    return ablation


def _typed(values: dict[str, Any], path: Path | str) -> Ablation:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Ablation).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"In {path}, {name} cannot be {first['input']!r}: {first['msg']}; correct it.") from None


def _arm(name: str, values: Any, shared: Mapping[str, Any], defaults: Mapping[str, Any]) -> Arm:
    if not isinstance(values, dict):
        raise UserError(f"Arm {name!r} is not of the form 'name: value', but {values!r}; correct it.")
    _check_keys(values, [one.name for one in fields(Arm) if one.name != "name"], f"Arm {name!r}")
    settings = {**shared, **flat(values.get("settings") or {})}
    last = str(values.get("last", defaults.get("last", "06"))).zfill(2)
    if last not in STAGE_NOTEBOOKS:
        raise UserError(f"Arm {name!r} has last {last!r}; name the notebook of a training stage, 04, 05 or 06.")
    connector = str(values.get("connector", defaults.get("connector", "sasa")))
    return Arm(name, connector, last, settings, dict(values.get("parameters") or {}))


def _check_keys(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{what} has a key {key!r}, but only {', '.join(known)}; correct it.")


def _check(ablation: Ablation) -> None:
    """Refuse whatever can be found wrong before anything runs."""
    get_profile(ablation.profile)
    check_dataset(ablation.dataset)
    seeds = ablation.seeds
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"The seeds are {list(seeds)}; give different whole numbers of 0 or more, like [0, 1, 2].")
    if ablation.split not in SPLITS:
        raise no_such("split", ablation.split, SPLITS)
    run_folder(ablation.name, ablation.profile)  # a plain name
    names = [_plain(arm.name) for arm in ablation.arms]
    double = {name for name in names if names.count(name) > 1}
    if double or "" in names:
        raise UserError(f"Two arms would share the run name {sorted(double | {''})[-1]!r}; rename one of them.")
    from lightmedvlm_utils.model.connectors import check_options  # torch: two seconds, and the first arm takes minutes

    notebooks = discover(project_root() / "notebooks")
    for arm in ablation.arms:
        profile = resolve(ablation.profile, arm.settings)
        resolve_parameters(select(notebooks, "", arm.last), {}, arm.parameters)
        load_plugins(profile.plugins)
        check_options(arm.connector, profile)


def _plain(name: str) -> str:
    """A name as part of a folder's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def run_ablation(ablation: Ablation, dry: bool = False, say: Callable[..., None] = print) -> list[dict[str, Any]]:
    """Train and measure every arm with every seed, write `outputs/<name>/`, and return its records.

    One record an arm (or baseline) and figure: `mean` and `sd` over the seeds, their `values`, and against the first
    arm the paired difference with a 95 % interval, patients resampled within each seed: `difference`, `low`, `high`.
    With `dry` only says what would be done.
    """
    folder = run_folder(ablation.name, ablation.profile)
    if manifests(folder):
        raise UserError(f"{folder} holds a run of the course; give the ablation another name.")
    runs = [(seed, arm) for seed in ablation.seeds for arm in ablation.arms]
    if dry:
        for seed, arm in runs:
            _train(ablation, arm, seed, True, say)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder, ".lock", "An ablation")
    try:
        draws: dict[str, list[dict[str, np.ndarray]]] = {}
        for seed, arm in runs:
            say(f"[{ablation.run_name(arm, seed)}]")
            _train(ablation, arm, seed, False, say)
            for name, figures in _measured(ablation, arm, seed).items():
                draws.setdefault(name or arm.name, []).append(figures)
        records = _records(ablation, draws)
        _write(ablation, records, folder)
        say(f"\n{format_records(records)}\n\nin {folder}: {RECORD}, {TABLE}, {FIGURE}")
        return records
    finally:
        held.release()


def _train(ablation: Ablation, arm: Arm, seed: int, dry: bool, say: Callable[..., None]) -> None:
    """One run of the course, in two parts: up to LAST_SHARED with every arm's connector, then with its own."""
    donors = [run_folder(ablation.run_name(other, seed), "") for other in ablation.arms if other is not arm]
    donors.append(run_folder("", ablation.profile))  # the course as it comes
    every = list(dict.fromkeys(other.connector for other in ablation.arms))
    names = {notebook.name[:2]: notebook for notebook in discover(project_root() / "notebooks")}
    for first, last, connectors in (("", LAST_SHARED, every), ("04", arm.last, [arm.connector])):
        defaults = [notebook.defaults for notebook in select(list(names.values()), first, last)]
        own = {key: value for key, value in arm.parameters.items() if any(key in known for known in defaults)}
        run_course(
            ablation.profile,
            ablation.dataset,
            ablation.data_root,
            ablation.run_name(arm, seed),
            seed,
            first,
            last,
            parameters={**own, "connectors": connectors},
            settings=arm.settings,
            dry=dry,
            say=say,
            donors=donors,
        )


def _measured(ablation: Ablation, arm: Arm, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """The figures of a trained run, kept in its folder as long as they would come out the same."""
    from lightmedvlm_utils.course import measure, stages  # torch and the rest: seconds

    folder = run_folder(ablation.run_name(arm, seed), "")
    stage = STAGE_NOTEBOOKS[arm.last]
    trained = read_manifest(folder, stages.STEPS[stage])
    assert trained is not None  # it has just been run
    baselines = ablation.baselines and arm is ablation.arms[0]
    code = {name: fingerprint.module_code(name) for name in fingerprint.loaded_modules()}
    samples = resolve(ablation.profile, arm.settings).bootstrap_samples
    key = digest([trained["fingerprint"], ablation.split, baselines, samples, code])
    kept = folder / f"measured_{ablation.split}.npz"
    if kept.exists():
        with np.load(kept) as saved:
            if str(saved["made_from"]) == key:
                return _nested({name: saved[name] for name in saved.files if name != "made_from"})
    parameters = trained["parameters"] | {"settings": arm.settings}
    step = read_step(parameters)
    found = measure.measure(step, stage, arm.connector, ablation.split, baselines)
    arrays = {f"{system}/{figure}": values for system, own in found.items() for figure, values in own.items()}
    with atomic_path(kept) as partial, open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, made_from=np.array(key), **arrays)
    return found


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, values in arrays.items():
        system, _, figure = name.rpartition("/")
        found.setdefault(system, {})[figure] = values
    return found


def _records(ablation: Ablation, draws: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> list[dict[str, Any]]:
    from lightmedvlm_utils.course.measure import FIGURES
    from lightmedvlm_utils.evaluation.bootstrap import estimate, p_value

    first = draws[ablation.arms[0].name]
    first_figures = {figure for figure in FIGURES if all(figure in own for own in first)}
    rows = []
    for name, seeds in draws.items():
        for figure in FIGURES:
            if not all(figure in own and np.isfinite(own[figure][0]) for own in seeds):
                continue  # not asked, or a seed without any: where no side is named, none can be right
            values = [float(own[figure][0]) for own in seeds]
            row: dict[str, Any] = {"arm": name, "figure": figure, "mean": float(np.mean(values))}
            row |= {"sd": float(np.std(values, ddof=1)) if len(values) > 1 else None, "values": values}
            if seeds is not first and figure in first_figures and figure != "validation_loss":
                gaps = [own[figure] - other[figure] for own, other in zip(seeds, first, strict=True)]
                gap = np.mean(gaps, axis=0)  # patients are resampled within each seed
                value, low, high = estimate(gap)
                row |= {"difference": value, "low": low, "high": high, "p": p_value(gap)}
            rows.append(row)
    about = {"split": ablation.split, "seeds": list(ablation.seeds), "against": ablation.arms[0].name}
    return [row | about for row in rows]


def _write(ablation: Ablation, records: list[dict[str, Any]], folder: Path) -> None:
    from lightmedvlm_utils import plots
    from lightmedvlm_utils.course.measure import FIGURES

    write_json(folder / RECORD, records)
    table = pd.DataFrame(records).assign(values=lambda t: t["values"].map(lambda v: " ".join(f"{x:.4f}" for x in v)))
    write_text(folder / TABLE, table.drop(columns=["seeds"]).to_csv(index=False))
    plots.set_style()
    plots.save(plots.ablation(records, FIGURES), folder / FIGURE)


def format_records(records: Sequence[Mapping[str, Any]]) -> str:
    """A line an arm: each figure's mean and sd over the seeds, then what differs from the first arm."""
    from lightmedvlm_utils.course.measure import FIGURES

    lines = []
    arms = list(dict.fromkeys(record["arm"] for record in records))
    seeds = len(records[0]["seeds"])
    lines.append(
        f"{records[0]['split']} split, {seeds} seed{'s' if seeds > 1 else ''}, against {records[0]['against']}"
    )
    for figure, title in FIGURES.items():
        found = {record["arm"]: record for record in records if record["figure"] == figure}
        if not found:
            continue
        lines.append(f"\n{title}")
        for arm in [arm for arm in arms if arm in found]:
            one = found[arm]
            spread = "" if one["sd"] is None else f" (sd {one['sd']:.3f})"
            lines.append(f"  {arm:<28}{one['mean']:6.3f}{spread}{_against(one)}")
    return "\n".join(lines)


def _against(record: Mapping[str, Any]) -> str:
    if record.get("low") is None:
        return ""
    interval = f"{record['difference']:+.3f}, {record['low']:+.3f} to {record['high']:+.3f}"
    shown = "" if record["low"] > 0 or record["high"] < 0 else ": no difference shown"
    return f"  {interval}{shown}"
