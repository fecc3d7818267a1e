"""The course's notebooks as the runner sees them: their order and their parameters."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightmedvlm_utils.config import check_dataset
from lightmedvlm_utils.errors import UserError

SHARED = ("profile", "dataset", "data_root", "run_name", "seed", "force", "settings")


@dataclass
class Notebook:
    """A lesson of the course: its name (`NN_title`), file and the defaults of its parameters cell."""

    path: Path
    defaults: dict

    @property
    def name(self) -> str:
        return self.path.stem


def discover(folder: Path) -> list[Notebook]:
    """The lessons `NN_*.ipynb` of a folder, in order."""
    paths = sorted(path for path in folder.glob("*.ipynb") if re.match(r"\d\d_", path.name))
    if not paths:
        raise UserError(f"There are no course notebooks in {folder}; run this inside a clone of the project.")
    return [Notebook(path, read_defaults(path)) for path in paths]


def select(notebooks: list[Notebook], first: str = "", last: str = "") -> list[Notebook]:
    """The notebooks from `first` to `last`, each given as a number ("02", "2") or a name."""
    start = _position(notebooks, first) if first else 0
    stop = _position(notebooks, last) if last else len(notebooks) - 1
    if start > stop:
        raise UserError(f"--from {first} comes after --to {last}; swap them.")
    return notebooks[start : stop + 1]


def _position(notebooks: list[Notebook], wanted: str) -> int:
    for position, notebook in enumerate(notebooks):
        number = notebook.name[:2]
        if wanted in (notebook.name, f"{notebook.name}.ipynb", number) or wanted.zfill(2) == number:
            return position
    known = ", ".join(notebook.name for notebook in notebooks)
    raise UserError(f"There is no notebook {wanted!r}; choose a number or a name of {known}.")


def read_defaults(path: Path) -> dict:
    """The literals assigned in the cell tagged `parameters`."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} is no readable notebook ({error}); restore it from git.") from error
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise UserError(f"{path} has {len(tagged)} cells tagged 'parameters'; it needs exactly one.")
    defaults = {}
    try:
        for node in ast.parse("".join(tagged[0]["source"])).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    defaults[name] = ast.literal_eval(value)
                case _:
                    raise ValueError("a statement of another kind")
    except (ValueError, SyntaxError) as error:
        raise UserError(f"The parameters cell of {path} may hold only lines 'name = literal'.") from error
    return defaults


def resolve_parameters(
    notebooks: Sequence[Notebook], shared: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, dict]:
    """For every notebook its complete parameters: defaults, shared values, and those of `given` it knows.

    Texts, as they come from the command line, are read as the type of the notebook's default.
    """
    for name in given:
        if name in SHARED:
            option = {"data_root": "--data-root", "run_name": "--run-name", "settings": "--set"}.get(name, f"--{name}")
            raise UserError(f"Parameter {name!r} belongs to the whole run; give it as {option}.")
        if not any(name in notebook.defaults for notebook in notebooks):
            raise UserError(_unknown_parameter(name, notebooks))
    values = {}
    for notebook in notebooks:
        values[notebook.name] = dict(notebook.defaults)
        for name, value in {**shared, **given}.items():
            if name in notebook.defaults:
                values[notebook.name][name] = _typed(name, value, notebook.defaults[name], notebook.name)
    return values


def _unknown_parameter(name: str, notebooks: Sequence[Notebook]) -> str:
    known = sorted({key for notebook in notebooks for key in notebook.defaults} - set(SHARED))
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"they know: {', '.join(known) or 'none of their own'}."
    return f"No selected notebook has a parameter {name!r}; {advice}"


def _typed(name: str, value, default, notebook: str):
    """`value` as the type of `default`; raises UserError where it is of another type."""
    kind = type(default)
    try:
        if isinstance(value, str) and kind is not str:
            value = {"true": True, "false": False}.get(value.lower(), value)
            value = ast.literal_eval(value) if isinstance(value, str) else value
        if kind is float and type(value) is int:
            value = float(value)
        if default is None or type(value) is kind:
            return value
    except (ValueError, SyntaxError):
        pass
    raise UserError(f"Parameter {name} of {notebook} takes a {kind.__name__} like {default!r}, not {value!r}.")


def checked_data_root(dataset: str, data_root: str) -> str:
    """`data_root` as an absolute path, since the kernels work in another folder."""
    check_dataset(dataset)
    if not data_root:
        return ""
    if dataset == "phantom":
        raise UserError("The phantom is drawn by the course itself and takes no --data-root; name another --dataset.")
    root = Path(data_root).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder of the {dataset} data as --data-root.")
    return str(root)
