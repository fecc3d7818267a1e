"""Run folders and manifests: how notebooks hand their results to each other, and how a run proves its inputs.

`outputs/<run>/NN_<notebook>/manifest.json` records what a step was given and what it made. Its `fingerprint`
covers the parameters, the profile's values, the notebook's code and the fingerprints of the steps it needs, so
that equal fingerprints mean equal results and the runner may skip the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from lightmedvlm_utils import __version__
from lightmedvlm_utils.config import DATASETS, Profile, get_profile
from lightmedvlm_utils.errors import UserError

MANIFEST = "manifest.json"
# Parameters that say where or how to run, not what to compute.
_NOT_INPUTS = ("run_name", "force")
_RECORDED_PACKAGES = ("torch", "timm", "transformers", "peft", "hdbscan", "numpy", "pandas")


def project_root() -> Path:
    """The folder that holds `notebooks/` and `pyproject.toml`: from the working directory upwards, else the
    installed package's own checkout, else the working directory."""
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def outputs_root() -> Path:
    """`outputs/` of the project, or the folder named by the environment variable LIGHTMEDVLM_OUTPUTS."""
    return Path(os.environ.get("LIGHTMEDVLM_OUTPUTS") or project_root() / "outputs").resolve()


def run_folder(run_name: str, profile: str) -> Path:
    """Folder of a run: `run_name`, or the profile's name where that is empty."""
    name = run_name or profile
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"run_name {name!r} is not a plain folder name; use letters, digits, '-' and '_'.")
    return outputs_root() / name


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` on success and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: Path | str, value: object) -> Path:
    """Write `value` as JSON, atomically; NumPy scalars become plain numbers."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n")


def write_parquet(frame, path: Path | str) -> Path:
    """Write a pandas DataFrame as parquet, atomically."""
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)
    return Path(path)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def read_manifest(folder: Path, step: str) -> dict | None:
    """The manifest of a step in a run folder, or None where the step has not finished."""
    try:
        return json.loads((Path(folder) / step / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{Path(folder) / step / MANIFEST} is damaged ({error}); delete it and run notebook {step} again."
        ) from error


def notebook_path(step: str) -> Path:
    return project_root() / "notebooks" / f"{step}.ipynb"


def _notebook_code_hash(step: str) -> str:
    """Hash of a notebook's code outside its parameters cell: editing the prose does not void a result."""
    path = notebook_path(step)
    if not path.is_file():
        return ""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    ]
    return _digest(code)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expected_fingerprint(step: str, parameters: dict, needs: dict[str, str]) -> str:
    """Fingerprint of a step for its parameters and its upstream fingerprints (`{step: fingerprint}`)."""
    inputs = {name: value for name, value in parameters.items() if name not in _NOT_INPUTS}
    profile = get_profile(parameters["profile"]).to_dict()
    return _digest([step, inputs, profile, needs, _notebook_code_hash(step), __version__])


def is_current(folder: Path, step: str, parameters: dict) -> bool:
    """Whether a step's manifest says it is done with these parameters and today's upstream results, and all its
    files still lie there."""
    manifest = read_manifest(folder, step)
    if manifest is None:
        return False
    upstream = {name: read_manifest(folder, name) for name in manifest["inputs"]}
    if any(found is None for found in upstream.values()):
        return False
    needs = {name: found["fingerprint"] for name, found in upstream.items()}
    files_there = all((folder / step / name).exists() for name in manifest["files"])
    return files_there and manifest["fingerprint"] == expected_fingerprint(step, parameters, needs)


@dataclass
class Step:
    """One notebook's place in a run; made by `start_step`."""

    name: str
    parameters: dict
    inputs: dict[str, dict]  # upstream step -> its manifest
    root: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def profile(self) -> Profile:
        return get_profile(self.parameters["profile"])

    @property
    def dataset(self) -> str:
        return self.parameters["dataset"]

    @property
    def data_root(self) -> str:
        return self.parameters["data_root"]

    @property
    def seed(self) -> int:
        return self.parameters["seed"]

    @property
    def fingerprint(self) -> str:
        needs = {name: manifest["fingerprint"] for name, manifest in self.inputs.items()}
        return expected_fingerprint(self.name, self.parameters, needs)

    @property
    def up_to_date(self) -> bool:
        """Whether this step's results are there already, for the same inputs, and `force` is off."""
        return not self.parameters["force"] and is_current(self.root, self.name, self.parameters)

    def manifest(self, upstream: str) -> dict:
        return self.inputs[upstream]

    def path(self, upstream: str, name: str) -> Path:
        """A file or folder that an earlier step made; raises UserError where it is gone."""
        path = self.root / upstream / name
        if not path.exists():
            raise UserError(f"{path} is missing; run notebook {upstream} again.")
        return path

    def rng(self):
        """A NumPy generator that depends on the seed and on the step's name."""
        import numpy as np

        return np.random.default_rng([self.seed, int(_digest(self.name), 16) % 2**32])

    def finish(self, metrics: dict, files: Sequence[Path | str] = ()) -> dict:
        """Write the manifest, the step's last act: a step without one has not happened.

        `files` may be absolute or relative to the step's folder; each must exist.
        """
        names = []
        for file in files:
            path = self.folder / file
            if not path.exists():
                raise UserError(f"Step {self.name} lists {path}, which it has not written.")
            names.append(str(path.relative_to(self.folder)))
        manifest = {
            "step": self.name,
            "fingerprint": self.fingerprint,
            "inputs": {name: found["fingerprint"] for name, found in self.inputs.items()},
            "parameters": self.parameters,
            "seed": self.seed,
            "profile": self.profile.to_dict(),
            "versions": _versions(),
            "device": _device_name(),
            "seconds": round(time.monotonic() - self.started, 1),
            "metrics": metrics,
            "files": names,
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest


def start_step(name: str, parameters: dict, needs: Sequence[str] = ()) -> Step:
    """Open a notebook's step: check its parameters and the manifests it needs, make its folder.

    Raises UserError that names the notebook to run first where an upstream manifest is missing or was made by
    another profile, data set or seed.
    """
    get_profile(parameters["profile"])
    if parameters["dataset"] not in DATASETS:
        choices = ", ".join(DATASETS)
        raise UserError(f"There is no data set {parameters['dataset']!r}; choose one of {choices}.")
    root = run_folder(parameters["run_name"], parameters["profile"])
    inputs = {}
    for upstream in needs:
        manifest = read_manifest(root, upstream)
        if manifest is None:
            raise UserError(
                f"Notebook {name} needs the results of {upstream}, which are not in {root}: run notebook "
                f"{upstream} first, with the same profile and run_name."
            )
        for key in ("profile", "dataset", "seed"):
            if manifest["parameters"][key] != parameters[key]:
                raise UserError(
                    f"{upstream} in {root} was run with {key}={manifest['parameters'][key]!r}, this notebook has "
                    f"{parameters[key]!r}: use the same value, or another run_name."
                )
        inputs[upstream] = manifest
    step = Step(name, parameters, inputs, root)
    try:
        step.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot make the folder {step.folder} ({error.strerror}); check its permissions or set "
            "LIGHTMEDVLM_OUTPUTS to a folder you can write to."
        ) from error
    return step


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def device_report(precision: str = "auto"):
    """Return (torch.device, dtype for autocast, reason). CUDA first, then Apple's MPS, then the CPU."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if torch.cuda.is_available():
        device, name = torch.device("cuda"), torch.cuda.get_device_name()
        # bfloat16 keeps float32's range and needs no loss scaling; cards before Ampere (a T4) lack it.
        best = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    elif torch.backends.mps.is_available():
        device, name, best = torch.device("mps"), "Apple GPU", torch.float32
    else:
        device, name, best = torch.device("cpu"), "no GPU was found", torch.float32
    dtype = best if precision == "auto" else dtypes[precision]
    return device, dtype, f"{device.type} ({name}), {str(dtype).removeprefix('torch.')}"


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
    import sys

    if "torch" in sys.modules:
        return device_report()[2]
    return f"cpu ({platform.machine()})"
