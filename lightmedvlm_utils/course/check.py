"""What `lightmedvlm check` reports: interpreter, packages, hardware, and the state of the runs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any

from lightmedvlm_utils import __version__
from lightmedvlm_utils.course.steps import MANIFEST
from lightmedvlm_utils.device import choose_device
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import outputs_root

MIN_FREE_GB = 3  # a laptop run writes about 1 GB; the rest is room for temporary copies
MIN_MEMORY_GB = 6


def collect() -> dict:
    """State of this installation as plain values; `problems` lists sentences for what must be put right."""
    packages = _packages()
    report: dict[str, Any] = {
        "lightmedvlm": __version__,
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "hardware": _hardware(),
        "outputs": _outputs(),
        "runs": _runs(),
        "model": _model(),
    }
    report["problems"] = _problems(report)
    return report


def _packages() -> dict[str, dict]:
    """Installed version and demanded range of every direct dependency."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("lightmedvlm") or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = None
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        found[requirement.name] = dict(installed=installed, needed=str(requirement.specifier), ok=fits)
    return found


def _hardware() -> dict:
    import psutil

    try:
        device = choose_device().reason
    except ImportError as error:
        device = f"unknown: torch cannot be imported ({error})"
    memory = psutil.virtual_memory()
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory.total / 2**30, 1),
        "memory_free_gb": round(memory.available / 2**30, 1),
        "device": device,
    }


def _outputs() -> dict:
    """Where results go, whether they can, and how much room is left there."""
    root = outputs_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    return {
        "folder": str(root),
        "writable": existing.is_dir() and os.access(existing, os.W_OK),
        "disk_free_gb": round(free / 2**30, 1),
    }


def _runs() -> list[dict]:
    """The finished steps of every run."""
    found = []
    for folder in sorted(outputs_root().glob("*")):
        steps = sorted(manifest.parent.name for manifest in folder.glob(f"[0-9][0-9]_*/{MANIFEST}"))
        if steps:
            found.append(dict(run=folder.name, steps=steps))
    return found


def _model() -> str | None:
    """The model that `report` and `vqa` take by default."""
    try:
        from lightmedvlm_utils.inference import newest_model

        return str(newest_model())
    except (ImportError, UserError):  # a missing package is reported among the packages
        return None


def _problems(report: dict) -> list[str]:
    problems = []
    if not report["packages"]:
        problems.append("The package lightmedvlm is not installed; run 'make test' or 'pip install -e .'.")
    for name, package in report["packages"].items():
        if not package["ok"]:
            state = f"is {package['installed']}" if package["installed"] else "is not installed"
            problems.append(f"{name} {state}, but {package['needed']} is needed; run 'pip install -e .'.")
    outputs, hardware = report["outputs"], report["hardware"]
    if not outputs["writable"]:
        problems.append(f"{outputs['folder']} cannot be written; set LIGHTMEDVLM_OUTPUTS to another folder.")
    if outputs["disk_free_gb"] < MIN_FREE_GB:
        problems.append(f"{outputs['folder']} has {outputs['disk_free_gb']} GB left; free {MIN_FREE_GB} GB.")
    if hardware["memory_gb"] < MIN_MEMORY_GB:
        problems.append(f"This machine has {hardware['memory_gb']} GB of memory; a laptop run takes up to 6 GB.")
    return problems


def format_report(report: dict) -> str:
    """The report as lines for a person."""
    hardware, outputs = report["hardware"], report["outputs"]
    lines = [
        f"LightMedVLM  {report['lightmedvlm']}",
        f"Python       {report['python']} ({report['interpreter']})",
        f"Platform     {report['platform']}",
        f"Cores        {hardware['cores']}",
        f"Memory       {hardware['memory_free_gb']} of {hardware['memory_gb']} GB free",
        f"Device       {hardware['device']}",
        f"Outputs      {outputs['folder']} ({outputs['disk_free_gb']} GB free)",
        "Packages     " + ", ".join(f"{name} {found['installed']}" for name, found in report["packages"].items()),
    ]
    for run in report["runs"]:
        lines.append(f"Run          {run['run']}: {len(run['steps'])} steps done, last {run['steps'][-1]}")
    if not report["runs"]:
        lines.append("Run          none yet; 'make run' or 'lightmedvlm run' makes one")
    lines.append(f"Model        {report['model'] or 'none yet'}")
    lines += [f"PROBLEM      {sentence}" for sentence in report["problems"]] or ["Everything needed is there."]
    return "\n".join(lines)
