"""`lightmedvlm ablate`: what a file may say, what runs share, and what is said of differences."""

import json
from pathlib import Path

import numpy as np
import pytest
from toy_course import write_notebook

from lightmedvlm_utils import plots
from lightmedvlm_utils.cli import main
from lightmedvlm_utils.course.ablation import Ablation, Arm, _records, format_records, read_ablation, run_ablation
from lightmedvlm_utils.course.runner import run_course
from lightmedvlm_utils.course.steps import run_folder
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model.connectors import check_options
from lightmedvlm_utils.settings import resolve

FILE = """
profile: smoke
seeds: [0, 3]
last: "05"
settings: {stage2.epochs: 2}
arms:
  ours: {}
  no labels: {settings: {stage1: {disease_loss: 0}, stage2.epochs: 1}}
  projector: {connector: mlp, last: 6, parameters: {strategy: none}}
"""


def test_a_file_is_read_into_arms(tmp_path):
    path = tmp_path / "sees.yaml"
    path.write_text(FILE)
    ablation = read_ablation(path)
    assert (ablation.name, ablation.seeds, ablation.split) == ("sees", (0, 3), "validate")
    ours, labels, projector = ablation.arms
    assert ours == Arm("ours", "sasa", "05", {"stage2.epochs": 2})
    assert labels.settings == {"stage2.epochs": 1, "stage1.disease_loss": 0}
    assert (projector.connector, projector.last, projector.parameters) == ("mlp", "06", {"strategy": "none"})
    assert ablation.run_name(labels, 3) == "sees-no_labels-3"
    assert run_ablation(ablation, dry=True, say=lambda *_, **__: None) == []
    assert not run_folder("sees", "").exists(), "a dry run writes nothing"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("seeds: [0, 3]", "seeds: [0, 0]", "different whole numbers"),
        ("seeds: [0, 3]", "seeds: many", "seeds cannot be 'many'"),
        ("profile: smoke", "profile: tiny", "no profile 'tiny'"),
        ("profile: smoke", "split: train", "no split 'train'"),
        ("profile: smoke", "repeat: 3", "a key 'repeat'"),
        ("stage2.epochs: 2", "stage2.epoch: 2", "did you mean 'stage2.epochs'"),
        ("stage2.epochs: 2", "stage2.epochs: many", "stage2.epochs cannot be 'many'"),
        ("connector: mlp", "conector: mlp", "a key 'conector'"),
        ("connector: mlp", "connector: mpl", "no connector 'mpl'"),
        ("strategy: none", "strategi: none", "did you mean 'strategy'"),
        ("last: 6", "last: 7", "a training stage"),
        ("no labels:", "ours!:", "share the run name 'ours'"),
        ("arms:", "arm:", "has no arms"),
        ("ours: {}", "ours: [1]", "'name: value'"),
    ],
)
def test_what_a_file_gets_wrong_is_said_before_anything_runs(tmp_path, before, after, words, capsys):
    path = tmp_path / "sees.yaml"
    path.write_text(FILE.replace(before, after))
    assert path.read_text() != FILE
    assert main(["ablate", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A clone with two lessons, of which the second reads `scale`."""
    (tmp_path / "pyproject.toml").touch()
    write_notebook(tmp_path, "00_first")
    write_notebook(tmp_path, "01_second", own="scale = 2\n", needs=["00_first"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTMEDVLM_OUTPUTS", raising=False)
    return tmp_path


def test_a_run_takes_over_what_another_made_alike_and_cannot_harm_it(project):
    def run(name, donors=(), **options):
        donors = [project / "outputs" / donor for donor in donors]
        record = run_course("smoke", run_name=name, donors=donors, say=lambda *_, **__: None, **options)
        return [step["status"] for step in record["steps"]]

    assert run("a") == ["done", "done"]
    assert run("b", ["nothing", "a"]) == ["kept", "kept"]
    assert run("c", ["a"], parameters={"scale": "3"}) == ["kept", "done"]
    assert run("d", ["a"], seed=1) == ["done", "done"], "another seed makes other results"
    first = project / "outputs/a/00_first/result.txt"
    assert first.samefile(project / "outputs/b/00_first/result.txt")
    assert run("b", force=True) == ["done", "done"]
    assert not first.samefile(project / "outputs/b/00_first/result.txt"), "written into a file that two runs share"
    assert run("a") == ["kept", "kept"]


def test_differences_are_paired_within_seeds_and_doubt_is_said():
    rng = np.random.default_rng(0)
    base = [rng.normal(0.5, 0.05, 1001) for _ in range(2)]  # draws of two seeds, whose patients differ
    draws = {
        "ours": [{"label_f1": own, "vqa": own} for own in base],
        "better": [{"label_f1": own + 0.02 + rng.normal(0, 0.005, 1001)} for own in base],
        "same": [{"label_f1": own + rng.normal(0, 0.02, 1001)} for own in base],
    }
    ablation = Ablation("toy", tuple(map(Arm, draws)), seeds=(0, 1))
    records = _records(ablation, draws)
    by_arm = {record["arm"]: record for record in records if record["figure"] == "label_f1"}
    better = by_arm["better"]
    assert better["difference"] == pytest.approx(
        np.mean([d["label_f1"][0] for d in draws["better"]]) - by_arm["ours"]["mean"]
    )
    assert 0.005 < better["low"] < 0.02 < better["high"] < 0.035, "unpaired, the interval would be ten times as wide"
    assert by_arm["same"]["low"] < 0 < by_arm["same"]["high"]
    assert "difference" not in by_arm["ours"] and [r["arm"] for r in records if r["figure"] == "vqa"] == ["ours"]
    lines = {line.split()[0]: line for line in format_records(records).splitlines() if line.startswith("  ")}
    assert "no difference shown" in lines["same"] and "no difference" not in lines["better"]
    json.dumps(records, allow_nan=False)
    panels = [ax.get_title() for ax in plots.ablation(records, {"label_f1": "F1", "vqa": "VQA"}).axes]
    assert panels[:2] == ["F1", "VQA"]


def test_a_folder_of_a_run_is_no_place_for_an_ablation(project):
    run_course("smoke", run_name="taken", say=lambda *_, **__: None)
    with pytest.raises(UserError, match="holds a run"):
        run_ablation(Ablation("taken", (Arm("ours"),), profile="smoke"))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "benchmarks/ablations").glob("*.yaml")))
def test_the_ablations_of_the_course_can_be_run(path):
    ablation = read_ablation(path)
    for arm in ablation.arms:
        check_options(arm.connector, resolve(ablation.profile, arm.settings))
