"""What the README says is so: its figures, its links, its commands."""

import json
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_results_are_those_of_the_reference_runs():
    reference = runpy.run_path(str(ROOT / "benchmarks/reference.py"))
    assert reference["fill"](README) == README
    run = json.loads((ROOT / "outputs/reference/run.json").read_text())
    for step, seconds in run["steps"].items():  # the course map's times
        assert re.search(rf"\(notebooks/{step}\.ipynb\).*\| {seconds:.0f} s \|", README), step


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) > 9
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\b", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
