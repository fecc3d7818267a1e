"""The whole course at the smoke profile through the command line, and the model that comes out of it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).parents[1]
DATA_STEPS = ["00_setup_and_tour", "01_data_cleaning", "02_cluster_analysis"]
MODEL_STEPS = ["03_building_sasa", "04_stage1_alignment", "05_stage2_report_generation"]
MODEL_STEPS += ["06_stage3_vqa", "07_evaluation", "08_demo"]
TOY_CONNECTOR = """
from torch import nn
from lightmedvlm_utils.model.connectors import Connector, register

class Mean(Connector):
    def __init__(self, vision_dim, llm_dim, grid):
        super().__init__()
        self.num_output_tokens, self.project = 1, nn.Linear(vision_dim, llm_dim)

    def forward(self, features):
        return self.project(features.mean(1, keepdim=True))

register("toy", Mean)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def lightmedvlm(outputs):
    """Run the command line in a process of its own; returns the finished process."""
    environment = dict(os.environ, LIGHTMEDVLM_OUTPUTS=str(outputs), HF_HUB_OFFLINE="1")

    def run(*arguments, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lightmedvlm_utils", *map(str, arguments)]
        own = environment | {name: str(value) for name, value in variables.items()}
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=own)

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
    assert [path.parent.name for path in manifests] == DATA_STEPS + MODEL_STEPS
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


def test_second_run_keeps_everything_and_its_figures(course, lightmedvlm):
    started = time.monotonic()
    done = lightmedvlm("run", "--profile", "smoke", "--json")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30
    assert json.loads(done.stdout)["steps"] == [step | {"status": "kept"} for step in course["steps"]]


def to_redo(lightmedvlm, *arguments, **options) -> dict[str, list[str]]:
    """What a run would do again, and why."""
    done = lightmedvlm("run", "--profile", "smoke", "--dry-run", "--json", *arguments, **options)
    assert done.returncode == 0, done.stderr
    return {step["name"]: step["reasons"] for step in json.loads(done.stdout)["plan"] if step["reasons"]}


def test_only_settings_that_a_step_reads_void_it(course, lightmedvlm):
    assert to_redo(lightmedvlm, "--set", "eval_batch_size=7") == {}
    assert list(to_redo(lightmedvlm, "--set", "bootstrap_samples=50")) == ["07_evaluation"]
    assert list(to_redo(lightmedvlm, "--set", "stage3.epochs=2")) == MODEL_STEPS[3:]
    assert list(to_redo(lightmedvlm, "--set", "stage1.epochs=2")) == MODEL_STEPS[1:]
    assert list(to_redo(lightmedvlm, "--set", "min_samples=3")) == ["02_cluster_analysis", *MODEL_STEPS[2:]]


def test_what_made_a_result_voids_it_and_nothing_else(course, lightmedvlm, clone):
    assert to_redo(lightmedvlm, cwd=clone) == {}, "a moved clone voids nothing"
    sasa = clone / "lightmedvlm_utils/model/connectors/sasa.py"
    source = sasa.read_text()
    sasa.write_text(
        source.replace(
            '"""(B, N, C), or with evidence several stages -> (B, Q, D)."""',
            '"""Another docstring."""  # and a comment',
        )
    )
    assert sasa.read_text() != source and to_redo(lightmedvlm, cwd=clone) == {}
    sasa.write_text(source.replace("tokens = self._attend(", "tokens = 0 * self._attend("))
    redo = to_redo(lightmedvlm, cwd=clone)
    assert list(redo) == MODEL_STEPS and all("model.connectors.sasa.py" in reasons for reasons in redo.values())
    sasa.write_text(source)
    weights = clone / "lightmedvlm_utils/backbones/swin/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight
    weights.write_bytes(content)
    redo = to_redo(lightmedvlm, cwd=clone)
    assert list(redo) == MODEL_STEPS and redo["03_building_sasa"] == ["the weights of vision"]


def test_moved_outputs_void_nothing(course, lightmedvlm, outputs, tmp_path):
    shutil.copytree(outputs / "smoke", tmp_path / "smoke")
    assert to_redo(lightmedvlm, LIGHTMEDVLM_OUTPUTS=tmp_path) == {}
    done = lightmedvlm("run", "--profile", "smoke", "--from", "08", "--force", LIGHTMEDVLM_OUTPUTS=tmp_path)
    assert done.returncode == 0, done.stderr  # its images are found where they lie now


def test_connectors_of_ones_own_go_through_the_course(course, lightmedvlm, outputs, tmp_path):
    """A toy of ten lines, beside one of the literature; the data steps are those of the run before."""
    (tmp_path / "toy_connector.py").write_text(TOY_CONNECTOR)
    (outputs / "toy").mkdir()
    for name in DATA_STEPS:
        shutil.copytree(outputs / "smoke" / name, outputs / "toy" / name)
    names = ["toy", "resampler"]
    options = ("--profile", "smoke", "--run-name", "toy", "--set", "plugins=[toy_connector]")
    done = lightmedvlm("run", *options, "-p", "connectors", json.dumps(names), "--json", PYTHONPATH=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    assert [steps[name]["status"] for name in DATA_STEPS] == ["kept"] * 3
    records = json.loads((outputs / "toy/07_evaluation/metrics.json").read_text())
    assert {*names, "toy_stage3", "shuffled_image", "toy_minus_resampler"} <= {record["system"] for record in records}
    (outputs / "toy").rename(tmp_path / "toy")  # the newest model is another test's
    image = sorted((outputs / "smoke/00_setup_and_tour/phantom").glob("files/**/*.jpg"))[0]
    model = tmp_path / "toy/06_stage3_vqa/toy"
    done = lightmedvlm("report", "--image", image, "--model", model)
    assert done.returncode == 2 and "no connector 'toy'" in done.stderr
    done = lightmedvlm("report", "--image", image, "--model", model, "--plugin", "toy_connector", PYTHONPATH=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_stage_that_is_killed_ends_with_the_same_weights(course, lightmedvlm, outputs, tmp_path):
    """SIGKILL in the middle of stage 1's training, then the same command again: as if nothing had happened."""
    (tmp_path / "killed").mkdir()
    for name in (*DATA_STEPS, "03_building_sasa"):
        shutil.copytree(outputs / "smoke" / name, tmp_path / "killed" / name)
    options = ("run", "--profile", "smoke", "--run-name", "killed", "--from", "04", "--to", "04")
    options += ("--set", "save_minutes=0.0001")
    home = tmp_path / "killed" / "04_stage1_alignment"
    environment = dict(os.environ, LIGHTMEDVLM_OUTPUTS=str(tmp_path), HF_HUB_OFFLINE="1")
    process = subprocess.Popen([sys.executable, "-m", "lightmedvlm_utils", *options], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 200
    while not list(home.glob(".unfinished/sasa/training/step-*[3-9].safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()
    process.wait()
    assert not (home / "sasa").exists(), "it was killed too late"
    done = lightmedvlm(*options, LIGHTMEDVLM_OUTPUTS=tmp_path)
    assert done.returncode == 0, done.stderr
    executed = (tmp_path / "killed/notebooks/04_stage1_alignment.ipynb").read_text()
    assert "going on from step" in executed and not (home / ".unfinished").exists()
    for name in ("sasa/model.safetensors", "mlp/model.safetensors", "sasa_history.json", "mlp_history.json"):
        assert (home / name).read_bytes() == (outputs / "smoke/04_stage1_alignment" / name).read_bytes(), name


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


def test_a_finished_run_is_measured(course, outputs, monkeypatch):
    from lightmedvlm_utils.course.measure import FIGURES, NEIGHBORS, USUAL_PLACE, measure
    from lightmedvlm_utils.course.steps import read_step

    monkeypatch.setenv("LIGHTMEDVLM_OUTPUTS", str(outputs))
    manifest = json.loads((outputs / "smoke/06_stage3_vqa/manifest.json").read_text())
    step = read_step(manifest["parameters"])
    found = measure(step, 3, "sasa", "validate", baselines=True)
    assert set(found[""]) == set(FIGURES) and set(found) == {"", *NEIGHBORS, USUAL_PLACE}
    assert set(measure(step, 2, "mlp", "validate")[""]) == set(FIGURES) - {
        "auroc", "pointing_game", "pointing_game_no_heart", "vqa", "vqa_open"
    }  # fmt: skip
    draws = [values for figures in found.values() for values in figures.values()]
    assert {len(values) for values in draws} == {101}  # the point and the profile's bootstrap samples
    shares = np.concatenate([own[f] for own in found.values() for f in own if f != "validation_loss"])
    assert (shares[~np.isnan(shares)] >= 0).all() and (shares[~np.isnan(shares)] <= 1).all()
    history = json.loads((outputs / "smoke/06_stage3_vqa/sasa_history.json").read_text())
    assert found[""]["validation_loss"][0] == history[-1]["validation_loss"]
