"""What a step's result was made from, and what of it is different now.

A result depends on the code that computed it, the values that this code read, the weights and the data it started
from, and on nothing else: not on comments or prose, not on where the files lie, not on settings that only later
steps read. Each of these sources is kept by name, so that a run can say what has changed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightmedvlm_utils.config import HOW, Profile
from lightmedvlm_utils.files import (
    SHIPPED_BACKBONES,
    code_hash,
    content_hash,
    digest,
    file_code_hash,
    plain,
    project_root,
    quick_hash,
)
from lightmedvlm_utils.settings import flatten

PACKAGE = "lightmedvlm_utils"
# Parameters that say where or how to run; `settings` are accounted for one by one, data by its content.
NOT_INPUTS = ("run_name", "force", "data_root", "settings")
# Modules that keep the books and compute nothing. The values in `config` count where they are read.
_BOOKKEEPING = (
    *("", "__main__", "cli", "config", "settings", "errors", "files", "course"),
    *(f"course.{name}" for name in ("steps", "fingerprint", "lessons", "kernel", "runner", "check")),
)
_WEIGHTS = {"vision": "timm/{}", "language_model": "{}"}  # setting -> repository on the hub
_TABLES = (".csv", ".gz", ".json", ".tgz", ".zip")
_MANY = 100  # a folder with more files is known by their names and sizes


def notebook_path(step: str) -> Path:
    return project_root() / "notebooks" / f"{step}.ipynb"


def notebook_code(step: str) -> str:
    """Hash of a notebook's code outside its parameters cell."""
    path = notebook_path(step)
    if not path.is_file():
        return ""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [
        code_hash("".join(cell["source"]))
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    ]
    return digest(code)


def loaded_modules(plugins: Iterable[str] = ()) -> dict[str, Path]:
    """Source files of the package's modules, and of the plugins, that this process has loaded and that compute."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        top, _, inner = name.partition(".")
        file = getattr(module, "__file__", None)
        if file and ((top == PACKAGE and inner not in _BOOKKEEPING) or name in plugins):
            found[name] = Path(file)
    return found


def module_code(name: str, plugins: Iterable[str] = ()) -> str:
    """Hash of a module's source as it lies on disk today; "" where it is gone. Loads nothing of the package."""
    top, _, inner = name.partition(".")
    if top == PACKAGE:
        base = Path(__file__).resolve().parents[1] / inner.replace(".", "/")
        candidates: tuple[Path, ...] = (
            (base.with_suffix(".py"), base / "__init__.py") if inner else (base / "__init__.py",)
        )
    else:
        from importlib.util import find_spec

        spec = find_spec(name) if name in plugins else None
        candidates = (Path(spec.origin),) if spec and spec.origin else ()
    return next((file_code_hash(path) for path in candidates if path.is_file()), "")


def code_of(places: Iterable[str]) -> dict[str, str]:
    """Hash of every module of these rooms and files of the package, whether it is loaded or not."""
    base = Path(__file__).resolve().parents[1]
    paths = sorted(
        path for place in places for path in ((base / place).rglob("*.py") if "." not in place else [base / place])
    )
    return {str(path.relative_to(base)): file_code_hash(path) for path in paths}


def setting_value(profile: Profile, name: str) -> Any:
    """What a setting contributes: its value, and for a backbone the weights that its name stands for."""
    value = flatten(profile)[name]
    return backbone_identity(name, value) if name in _WEIGHTS else value


def backbone_identity(part: str, name: str) -> str:
    """Stands for a backbone's weights: every byte of a local folder, the commit of a cached hub repository, or the
    name alone where nothing is there yet."""
    folder = SHIPPED_BACKBONES[part].get(name, Path(name))
    if folder.is_dir():
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
        return digest({path.name: _weights_hash(path) for path in files})
    return f"{name}@{_hub_commit(_WEIGHTS[part].format(name))}"


_hashed: dict[tuple[str, int, int], str] = {}


def _weights_hash(path: Path) -> str:
    """`content_hash`, computed once for each state of the file: a large model takes seconds."""
    state = path.stat()
    key = (str(path), state.st_mtime_ns, state.st_size)
    if key not in _hashed:
        _hashed[key] = content_hash(path)
    return _hashed[key]


def _hub_commit(repository: str) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    reference = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs/main"
    return reference.read_text().strip() if reference.is_file() else ""


def data_identity(dataset: str, root: Path | None) -> dict[str, str]:
    """What a data set is known by, wherever it lies: the tables, archives and folders in its root.

    Empty for the phantom, which the settings and the code that draws it determine.
    """
    if dataset == "phantom":
        return {}
    if root is None:
        from lightmedvlm_utils.data.openi import package_file

        archive = package_file("NLMCXR_reports.tgz")
        return {archive.name: quick_hash(archive)}
    entries = sorted(root.iterdir()) if root.is_dir() else []
    tables = {path.name: quick_hash(path) for path in entries if path.suffix in _TABLES and path.is_file()}
    return tables | {path.name: "folder" for path in entries if path.is_dir() and path.name[0] != "."}


def file_identity(path: Path) -> str:
    """Stands for an artefact: a file's size, head and tail; a folder's files likewise; "" where it is not there.

    Figures are drawn from results and drawn again when a notebook is read: of them only the presence counts.
    """
    if path.is_dir():
        start = len(str(path)) + 1  # strings, not Paths: a phantom has tens of thousands of files
        names = sorted(os.path.join(home, name)[start:] for home, _, files in os.walk(path) for name in files)
        if len(names) > _MANY:
            return digest([[name, os.path.getsize(os.path.join(path, name))] for name in names])
        return digest({name: quick_hash(path / name) for name in names})
    if not path.is_file():
        return ""
    return "figure" if path.suffix == ".png" else quick_hash(path)


def sources(
    step: str, parameters: Mapping[str, Any], profile: Profile, reads: Iterable[str], code: Mapping[str, str]
) -> dict[str, Any]:
    """What a result is made from beside its data and the steps before it, in the form that JSON gives it."""
    read = sorted(set(reads) & set(flatten(profile)) - set(HOW))
    found = {
        "notebook": notebook_code(step),
        "parameters": {name: value for name, value in parameters.items() if name not in NOT_INPUTS},
        "settings": {name: setting_value(profile, name) for name in read},
        "code": dict(code),
    }
    return json.loads(json.dumps(found, default=plain))


def differences(made_from: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a result's sources is different now, each in a few words."""
    found = [] if made_from["notebook"] == now["notebook"] else ["the notebook's code"]
    for kind in ("parameters", "settings"):
        for name in _unequal(made_from[kind], now[kind]):
            was, is_now = (values[kind].get(name) for values in (made_from, now))
            found.append(f"the weights of {name}" if name in _WEIGHTS else f"{name} {was!r} -> {is_now!r}")
    found += [name.removeprefix(f"{PACKAGE}.") + ".py" for name in _unequal(made_from["code"], now["code"])]
    return found


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
