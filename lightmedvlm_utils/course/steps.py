"""The ledger: how notebooks hand their results to each other, and how a run proves what they were made from.

`outputs/<run>/NN_<notebook>/manifest.json` is a step's last act; a step without one has not happened. It records what
the step was made from (`fingerprint.py`) and what it made. A step that begins anew first removes its old manifest, so
an interrupted one is never taken for done; one whose sources and files are as recorded may be skipped.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightmedvlm_utils import LOADED_AT, __version__
from lightmedvlm_utils.config import Profile, check_dataset
from lightmedvlm_utils.course import fingerprint
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import digest, file_code_hash, outputs_root, write_json
from lightmedvlm_utils.settings import changes, describe, flatten, load_plugins, resolve

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"  # in a step's folder: what goes on where it was interrupted; gone when it is finished
RESERVED = ("reference",)  # folders under outputs/ that git tracks
FIRST_STEP = "00_setup_and_tour"  # the one that puts the data set in place
_RECORDED_PACKAGES = ("torch", "timm", "transformers", "peft", "hdbscan", "numpy", "pandas")
_locks: dict[Path, FileLock] = {}  # held by this process until the step is finished or the process ends


def run_folder(run_name: str, profile: str) -> Path:
    """Folder of a run: `run_name`, or the profile's name where that is empty."""
    name = run_name or profile
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"run_name {name!r} is not a plain folder name; use letters, digits, '-' and '_'.")
    if name in RESERVED:
        raise UserError(f"outputs/{name} is part of the project itself, no place for a run; choose another run_name.")
    return outputs_root() / name


def lock(folder: Path, name: str, work: str, wait: float = 0) -> FileLock:
    """Hold `folder/name` for this process; raises UserError that says `work` is under way where another one does,
    after `wait` seconds.

    The operating system frees it when the process ends, however it ends.
    """
    held = FileLock(folder / name, mode=0o644)
    try:
        held.acquire(timeout=wait)
    except Timeout as error:
        raise UserError(
            f"{work} in {folder} is under way in another process; wait for it or stop it, or choose another run_name."
        ) from error
    return held


def read_manifest(folder: Path, step: str) -> dict[str, Any] | None:
    """The manifest of a step in a run folder, or None where the step has not finished.

    What is no manifest (damaged, or of an earlier version of the course) proves nothing: None too.
    """
    try:
        manifest = json.loads((Path(folder) / step / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if _is_whole(manifest) else None


def _is_whole(manifest: Any) -> bool:
    """Whether a file's content says what the ledger needs to know."""

    def has(part: Any, *names: str) -> bool:
        return isinstance(part, dict) and set(names) <= set(part)

    return (
        has(manifest, "fingerprint", "seed", "seconds")
        and has(manifest.get("parameters"), "profile", "dataset")
        and has(manifest.get("made_from"), "notebook")
        and all(has(manifest["made_from"].get(part)) for part in ("parameters", "settings", "code", "inputs"))
        and all(has(manifest.get(part)) for part in ("files", "metrics"))
    )


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifests of all finished steps of a run, by step."""
    names = sorted(path.parent.name for path in Path(folder).glob(f"[0-9A-Z][0-9]_*/{MANIFEST}"))
    found = {name: read_manifest(folder, name) for name in names}
    return {name: manifest for name, manifest in found.items() if manifest}


def check_run(folder: Path, profile: str, dataset: str) -> None:
    """Raises UserError where the folder holds results of another profile or data set."""
    for name, manifest in manifests(folder).items():
        for key, value in (("profile", profile), ("dataset", dataset)):
            if manifest["parameters"][key] != value:
                raise UserError(
                    f"{folder} holds a run with {key} {manifest['parameters'][key]!r} ({name} of it), this one has "
                    f"{value!r}: choose another run_name, or delete the folder."
                )


def why_stale(folder: Path, step: str, parameters: Mapping[str, Any]) -> list[str]:
    """Why a step must be redone to be right for these parameters, each reason in a few words; empty: it is current.

    Looks at the manifest and what it names, and executes nothing.
    """
    manifest = read_manifest(folder, step)
    if manifest is None:
        home = Path(folder) / step
        if (home / MANIFEST).exists():
            return ["its manifest is damaged or of an earlier version"]
        return ["it was interrupted or has failed"] if home.is_dir() else ["it has not been run"]
    made_from = manifest["made_from"]
    profile = resolve(parameters["profile"], parameters.get("settings"))
    code = {name: fingerprint.module_code(name, profile.plugins) for name in made_from["code"]}
    now = fingerprint.sources(step, parameters, profile, made_from["settings"], code)
    reasons = fingerprint.differences(made_from, now)
    if "data" in made_from:
        root = data_folder(folder, parameters)
        if fingerprint.data_identity(parameters["dataset"], root) != made_from["data"]:
            reasons.append("the data set's tables")
    for upstream, was in made_from["inputs"].items():
        found = read_manifest(folder, upstream)
        if found is None or found["fingerprint"] != was:
            reasons.append(f"the results of {upstream}")
    files = manifest["files"].items()
    reasons += [f"file {name}" for name, was in files if fingerprint.file_identity(folder / step / name) != was]
    return reasons


def data_folder(folder: Path, parameters: Mapping[str, Any]) -> Path | None:
    """The data set's root: the phantom's own, or `data_root`, by default the one that notebook 00 was given.

    None for the reports that come inside a package.
    """
    if parameters["dataset"] == "phantom":
        return Path(folder) / FIRST_STEP / "phantom"
    root = parameters.get("data_root", "")
    if not root:
        first = read_manifest(folder, FIRST_STEP)
        root = first["parameters"].get("data_root", "") if first else ""
    return Path(root).expanduser().resolve() if root else None


@dataclass
class Step:
    """One notebook's place in a run; made by `start_step`."""

    name: str
    parameters: dict[str, Any]
    inputs: dict[str, dict[str, Any]]  # upstream step -> its manifest
    root: Path
    resolved: Profile  # with the settings given
    profile: Profile  # the same; what is read of this one becomes part of the fingerprint
    up_to_date: bool  # whether this step's results are there already, for the same sources, and `force` is off
    reads: set[str]  # settings read so far
    code: dict[str, str]  # hash of every module loaded so far
    started: float = field(default_factory=time.monotonic)
    _uses_data: bool = False

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def dataset(self) -> str:
        return self.parameters["dataset"]

    @property
    def seed(self) -> int:
        return self.parameters["seed"]

    @property
    def data_root(self) -> Path | None:
        """The data set's root folder, see `data_folder`; its tables become part of the fingerprint."""
        self._uses_data = True
        return data_folder(self.root, self.parameters)

    def manifest(self, upstream: str) -> dict[str, Any]:
        return self.inputs[upstream]

    def path(self, upstream: str, name: str) -> Path:
        """A file or folder that an earlier step made; raises UserError where it is gone."""
        path = self.root / upstream / name
        if not path.exists():
            raise UserError(f"{path} is missing; run notebook {upstream} again.")
        return path

    def studies(self, upstream: str, name: str):
        """A study table (pandas DataFrame) that an earlier step made, the paths of its images made absolute."""
        from lightmedvlm_utils.data.studies import read_study_table

        return read_study_table(self.path(upstream, name), data_folder(self.root, self.parameters))

    def rng(self):
        """A NumPy generator that depends on the seed and on the step's name."""
        import numpy as np

        return np.random.default_rng([self.seed, int(digest(self.name), 16) % 2**32])

    def unfinished(self, name: str) -> Path:
        """A folder for what is under way in this step; it is removed when the step is finished, or begun by force."""
        return self.folder / UNFINISHED / name

    def finish(self, metrics: dict[str, Any], files: Sequence[Path | str] = ()) -> dict[str, Any]:
        """Write the manifest, the step's last act: a step without one has not happened.

        `files` may be absolute or relative to the step's folder; each must exist.
        """
        made = {}
        for file in files:
            path = self.folder / file
            if not path.exists():
                raise UserError(f"Step {self.name} lists {path}, which it has not written.")
            made[str(path.relative_to(self.folder))] = fingerprint.file_identity(path)
        made_from = self._made_from()
        manifest = {
            "step": self.name,
            "fingerprint": digest([made_from, made]),
            "made_from": made_from,
            "parameters": self.parameters,
            "seed": self.seed,
            "profile": flatten(self.resolved),
            "changed_settings": changes(self.resolved),
            "versions": _versions(),
            "device": _device_name(),
            "seconds": self._seconds(),
            "metrics": metrics,
            "files": made,
        }
        write_json(self.folder / MANIFEST, manifest)
        shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
        if held := _locks.pop(self.folder, None):
            held.release()
        return manifest

    def _made_from(self) -> dict[str, Any]:
        """What this result was made from. Where earlier results were only loaded, what those were made from counts."""
        loaded = fingerprint.loaded_modules(self.resolved.plugins)
        code = {name: file_code_hash(path) for name, path in loaded.items()} | self.code
        reads, uses_data = set(self.reads), self._uses_data
        before = read_manifest(self.root, self.name) if self.up_to_date else None
        if before:
            code |= before["made_from"]["code"]
            reads |= set(before["made_from"]["settings"])
            uses_data |= "data" in before["made_from"]
        made_from = fingerprint.sources(self.name, self.parameters, self.resolved, reads, code)
        if uses_data:
            root = data_folder(self.root, self.parameters)
            made_from["data"] = fingerprint.data_identity(self.dataset, root)
        return made_from | {"inputs": {name: found["fingerprint"] for name, found in self.inputs.items()}}

    def _seconds(self) -> float:
        """What the result cost: a step that only loaded it keeps the figure of the one that made it."""
        before = read_manifest(self.root, self.name) if self.up_to_date else None
        return before["seconds"] if before else round(time.monotonic() - self.started, 1)


def start_step(name: str, parameters: Mapping[str, Any], needs: Sequence[str] = ()) -> Step:
    """Open a notebook's step: check its parameters and the manifests it needs, make its folder.

    Unless its result is there and current, the step's old manifest is removed. Raises UserError that names the
    notebook to run first where an upstream manifest is missing or was made with other values, and where the same
    step is under way in another process.
    """
    parameters = dict(parameters)
    profile = resolve(parameters["profile"], parameters.get("settings"))
    check_dataset(parameters["dataset"])
    load_plugins(profile.plugins)
    _check_loaded_code(profile)
    root = run_folder(parameters.get("run_name", ""), parameters["profile"])
    check_run(root, parameters["profile"], parameters["dataset"])
    inputs = {upstream: _input(root, name, upstream, parameters, profile) for upstream in needs}
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot make the folder {folder} ({error.strerror}); check its permissions or set "
            "LIGHTMEDVLM_OUTPUTS to a folder you can write to."
        ) from error
    if folder not in _locks:
        # The kernel of a runner that was killed notices that, and ends too, within a second or two.
        _locks[folder] = lock(folder, ".lock", f"Notebook {name}", wait=10)
    reasons = ["force is set"] if parameters.get("force") else why_stale(root, name, parameters)
    if reasons and (folder / MANIFEST).exists():
        print(f"the earlier result of {name} is redone: {', '.join(reasons)}")
        (folder / MANIFEST).unlink()
        _unshare(folder)
    if parameters.get("force"):
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    reads: set[str] = set()
    loaded = fingerprint.loaded_modules(profile.plugins)
    code = {module: file_code_hash(path) for module, path in loaded.items()}
    for line in describe(profile):
        print(f"setting {line}")
    return Step(name, parameters, inputs, root, profile, profile.noting(reads), not reasons, reads, code)


def read_step(parameters: Mapping[str, Any]) -> Step:
    """A run to read from, as a notebook with these parameters would find it; nothing of it is locked or written."""
    parameters = dict(parameters)
    profile = resolve(parameters["profile"], parameters.get("settings"))
    load_plugins(profile.plugins)
    root = run_folder(parameters.get("run_name", ""), parameters["profile"])
    return Step("", parameters, {}, root, profile, profile, True, set(), {})


def take_over(folder: Path, donors: Sequence[Path], values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Take steps that the folder lacks over from other runs, as far as they are current for these parameters (by step,
    in order) and were made from the same earlier results; returns their names.

    Files become hard links where the file system has them.
    """
    taken: list[str] = []
    for name, parameters in values.items():
        if read_manifest(folder, name) is not None:
            continue
        donor = next((other for other in donors if _has(other, folder, name, parameters)), None)
        if donor is None:
            break  # what follows is made from this one
        partial = folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(donor / name, partial, copy_function=_link, ignore=shutil.ignore_patterns(".lock"))
        shutil.rmtree(folder / name, ignore_errors=True)
        partial.rename(folder / name)
        taken.append(name)
    return taken


def _has(donor: Path, folder: Path, name: str, parameters: Mapping[str, Any]) -> bool:
    """Whether another run has the step as this one would make it."""
    manifest = read_manifest(donor, name)
    if manifest is None or why_stale(donor, name, parameters):
        return False
    own = {upstream: read_manifest(folder, upstream) for upstream in manifest["made_from"]["inputs"]}
    return all(
        (found := own[upstream]) is not None and found["fingerprint"] == was
        for upstream, was in manifest["made_from"]["inputs"].items()
    )


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target


def _unshare(folder: Path) -> None:
    """Let go of a stale step's files that another run has too: writing into one would change the other's. (Folders are
    made anew beside the old ones and need no help.)"""
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_nlink > 1:
            path.unlink()


def _input(root: Path, name: str, upstream: str, parameters: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """The manifest of an upstream step, checked to be of the same run as this one."""
    manifest = read_manifest(root, upstream)
    if manifest is None:
        raise UserError(
            f"Notebook {name} needs the results of {upstream}, which are not in {root}: run notebook "
            f"{upstream} first, with the same profile and run_name."
        )
    values = [("seed", manifest["seed"], parameters["seed"])]
    read = manifest["made_from"]["settings"]
    values += [(key, was, fingerprint.setting_value(profile, key)) for key, was in read.items()]
    for key, was, now in values:
        if digest(was) != digest(now):
            raise UserError(
                f"{upstream} in {root} was run with {key} {was!r}, this notebook has {now!r}: use the same value, run "
                f"{upstream} again, or choose another run_name."
            )
    return manifest


def _check_loaded_code(profile: Profile) -> None:
    """A result must come from the code whose hash it bears: refuse where a loaded file was edited since."""
    for module, path in fingerprint.loaded_modules(profile.plugins).items():
        if LOADED_AT < path.stat().st_mtime <= time.time():  # later than now: a clock is wrong, not the code
            raise UserError(f"{path} was edited after this kernel loaded {module}; restart the kernel and run again.")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "lightmedvlm": __version__}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _device_name() -> str:
    """What the step ran on; asks torch only where the step has loaded it anyway."""
    if "torch" in sys.modules:
        from lightmedvlm_utils.device import choose_device

        return choose_device().reason
    return f"cpu ({platform.machine()})"
