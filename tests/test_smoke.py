"""The whole course at the smoke profile through the command line, and the model that comes out of it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS_WITH_MANIFEST = 8  # 00 to 07; the demo leaves none


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def lightmedvlm(outputs):
    """Run the command line in a process of its own; returns the finished process."""
    environment = dict(os.environ, LIGHTMEDVLM_OUTPUTS=str(outputs), HF_HUB_OFFLINE="1")

    def run(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lightmedvlm_utils", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    return run


@pytest.fixture(scope="module")
def course(lightmedvlm):
    """The record of one full run; the other tests look at what it left."""
    done = lightmedvlm("run", "--profile", "smoke", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def radiograph(course, outputs) -> Path:
    dataset = json.loads((outputs / "smoke" / "00_setup_and_tour" / "dataset.json").read_text())
    return sorted(Path(dataset["root"]).glob("files/**/*.jpg"))[0]


def test_every_step_is_done_and_its_files_are_there(course, outputs):
    assert [step["status"] for step in course["steps"]] == ["done"] * 9
    manifests = sorted((outputs / "smoke").glob("*/manifest.json"))
    assert len(manifests) >= STEPS_WITH_MANIFEST
    for path in manifests:
        for name in json.loads(path.read_text())["files"]:
            assert (path.parent / name).exists(), name
    assert max(step["peak_memory_mb"] for step in course["steps"]) < 6000


def test_metrics_are_tidy_and_hold_the_baselines(course, outputs):
    records = json.loads((outputs / "smoke" / "07_evaluation" / "metrics.json").read_text())
    keys = {"system", "task", "metric", "value", "low", "high", "n", "unit", "protocol", "section", "split"}
    assert all(set(record) == keys for record in records)
    systems = {record["system"] for record in records}
    assert {"sasa", "mlp", "most_frequent", "nearest_neighbour", "shuffled_image", "blind"} <= systems
    for record in records:
        if record["low"] is not None:
            assert record["low"] <= record["value"] <= record["high"], record


def test_second_run_keeps_everything(course, lightmedvlm):
    started = time.monotonic()
    done = lightmedvlm("run", "--profile", "smoke", "--json")
    assert done.returncode == 0, done.stderr
    assert [step["status"] for step in json.loads(done.stdout)["steps"]] == ["kept"] * 9
    assert time.monotonic() - started < 30


def test_report_and_answers_from_the_newest_model(radiograph, lightmedvlm, tmp_path):
    done = lightmedvlm("report", "--image", radiograph, "--output", tmp_path / "report.txt")
    assert done.returncode == 0, done.stderr
    assert "Not for clinical use" in done.stderr
    assert (tmp_path / "report.txt").read_text().strip()
    done = lightmedvlm("vqa", "--image", radiograph, "--question", "Is there a pleural effusion?", "--json")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["answers"]
    assert answer["answer"] in ("yes", "no") and 0 <= answer["probability_of_yes"] <= 1


def test_truncated_image_is_refused(radiograph, lightmedvlm, tmp_path):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(radiograph.read_bytes()[:2000])
    done = lightmedvlm("report", "--image", cut, "--output", tmp_path / "report.txt")
    assert done.returncode == 2 and str(cut) in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "report.txt").exists()


def test_check_sees_the_run(course, lightmedvlm):
    report = json.loads(lightmedvlm("check", "--json").stdout)
    assert [run["run"] for run in report["runs"]] == ["smoke"]
    assert report["model"]
