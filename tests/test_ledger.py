"""A run cannot lie: what is kept is what these sources made, whatever happened to the process in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_course import write_notebook

from lightmedvlm_utils.course import fingerprint
from lightmedvlm_utils.course.runner import run_course
from lightmedvlm_utils.course.steps import read_manifest, start_step
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import code_hash, quick_hash

PACKAGE = Path(__file__).parents[1]


BODY = """\
import os, time
(step.folder / "result.txt").write_text("do")
if mode == "die":
    os._exit(1)
if mode == "wait":
    (step.folder / "waiting").touch()
    time.sleep(60)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A clone with two lessons; the second writes `result.txt` in two halves, and dies between them on request."""
    (tmp_path / "pyproject.toml").touch()
    write_notebook(tmp_path, "00_first")
    write_notebook(tmp_path, "01_second", own='mode = "run"\n', needs=["00_first"], body=BODY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTMEDVLM_OUTPUTS", raising=False)
    return tmp_path


def run(**options):
    """(statuses, what was said) of a run at smoke."""
    said: list[str] = []
    record = run_course("smoke", say=lambda text="", **_: said.append(text), **options)
    return [step["status"] for step in record["steps"]], "\n".join(said)


def start(project, *arguments) -> subprocess.Popen:
    """The runner as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lightmedvlm_utils", "run", "--profile", "smoke", *arguments],
        env=dict(os.environ, PYTHONPATH=str(PACKAGE)),
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_between_two_cells_goes_on(project, how):
    process = start(project, "-p", "mode", "wait")
    wait_for(project / "outputs/smoke/01_second/waiting", process)
    process.send_signal(how)
    process.communicate(timeout=30)
    statuses, said = run()
    assert statuses == ["kept", "done"] and "interrupted" in said
    assert (project / "outputs/smoke/01_second/result.txt").read_text() == "done"


def test_a_result_that_was_half_overwritten_is_not_kept(project):
    assert run()[0] == ["done", "done"]
    with pytest.raises(Exception, match="kernel was killed"):
        run(parameters={"mode": "die"})
    assert (project / "outputs/smoke/01_second/result.txt").read_text() == "do"
    assert run()[0] == ["kept", "done"]


def test_a_file_that_was_changed_afterwards_is_noticed(project):
    run()
    (project / "outputs/smoke/01_second/result.txt").write_text("dome")
    statuses, said = run()
    assert statuses == ["kept", "done"] and "file result.txt" in said


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"made_from": 3}', '{"fingerprint": "x", "files": []}'])
def test_a_damaged_manifest_proves_nothing(project, content):
    run()
    (project / "outputs/smoke/01_second/manifest.json").write_text(content)
    statuses, said = run()
    assert statuses == ["kept", "done"] and "manifest is damaged" in said


def test_code_counts_by_what_it_does(project):
    run()
    path = project / "notebooks" / "00_first.ipynb"
    source = path.read_text()
    path.write_text(source.replace('.write_text(\\"done\\")', '.write_text(\\"done\\")  # a comment'))
    assert path.read_text() != source and run()[0] == ["kept", "kept"]
    path.write_text(source.replace('.write_text(\\"done\\")', '.write_text(\\"new\\")'))
    statuses, said = run()
    assert statuses == ["done", "done"]
    assert "redo 00_first" in said and "the notebook's code" in said and "00_first is redone" in said


def test_code_hash_is_blind_to_comments_docstrings_and_layout_alone():
    plain = "def f(x):\n    return x + 1\n"
    assert code_hash('def f(x):\n    """Add."""\n\n    return (x + 1)  # one\n') == code_hash(plain)
    assert code_hash(plain.replace("1", "2")) != code_hash(plain)
    assert code_hash("%magic") != code_hash("%other")


def test_a_later_run_keeps_the_figures_of_an_earlier_one(project):
    run()
    record = project / "outputs/smoke/run.json"
    first = {step["name"]: step for step in json.loads(record.read_text())["steps"]}
    assert run()[0] == ["kept", "kept"] and run(first="01")[0] == ["kept"]
    later = {step["name"]: step for step in json.loads(record.read_text())["steps"]}
    assert set(later) == set(first)
    for name, step in later.items():
        assert {**step, "status": "done"} == first[name] and step["seconds"] > 0 and step["peak_memory_mb"] > 0


def test_two_runs_in_one_folder_are_refused(project):
    process = start(project, "-p", "mode", "wait")
    try:
        wait_for(project / "outputs/smoke/01_second/waiting", process)
        with pytest.raises(UserError, match="under way"):
            run()
        _, errors = start(project).communicate(timeout=60)
        assert errors.count("\n") == 1 and "under way" in errors
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def test_another_data_set_or_profile_over_a_run_is_refused(project):
    run()
    before = (project / "outputs/smoke/00_first/manifest.json").read_text()
    with pytest.raises(UserError, match="holds a run with dataset 'phantom'"):
        run(dataset="openi")
    with pytest.raises(UserError, match="holds a run with profile 'smoke'"):
        run_course("laptop", run_name="smoke", say=lambda *_, **__: None)
    with pytest.raises(UserError, match="part of the project"):
        run(run_name="reference")
    assert (project / "outputs/smoke/00_first/manifest.json").read_text() == before


def test_a_dry_run_says_what_it_would_do_and_does_nothing(project):
    record = run_course("smoke", dry=True, say=lambda *_, **__: None)
    assert [step["reasons"] for step in record["plan"]] == [["it has not been run"]] * 2 and record["steps"] == []
    assert not (project / "outputs").exists()


def step_of(name="00_first", needs=(), **given):
    shared = dict(profile="smoke", dataset="phantom", data_root="", run_name="", seed=0, force=False, settings={})
    return start_step(name, shared | given, needs)


def test_only_the_settings_that_were_read_count(project):
    step = step_of()
    assert step.profile.stage2.epochs == 1
    step.finish({})
    made_from = read_manifest(project / "outputs/smoke", "00_first")["made_from"]
    assert list(made_from["settings"]) == ["stage2.epochs"]
    assert step_of(settings={"stage3.epochs": 2, "eval_batch_size": 1}).up_to_date
    with pytest.raises(UserError, match=r"stage2.epochs 1, this notebook has 2"):
        step_of("01_second", ["00_first"], settings={"stage2.epochs": 2})
    assert not step_of(settings={"stage2.epochs": 2}).up_to_date


def test_a_step_that_begins_anew_has_no_manifest_and_one_that_loads_keeps_its_cost(project):
    step_of().finish({})
    path = project / "outputs/smoke/00_first/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"seconds": 1234.0}))
    step_of().finish({})
    assert json.loads(path.read_text()) == manifest | {"seconds": 1234.0}
    step_of(force=True)
    assert not path.exists()


def test_code_edited_under_a_running_kernel_is_refused(project, monkeypatch):
    monkeypatch.setattr("lightmedvlm_utils.course.steps.LOADED_AT", 0.0)
    with pytest.raises(UserError, match="restart the kernel"):
        step_of()


def test_data_is_known_by_its_tables_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "files").mkdir(parents=True)
        (tmp_path / name / "labels.csv").write_text("study_id\n1\n" + "2\n" * 100_000)
    identity = fingerprint.data_identity("mimic", tmp_path / "a")
    assert identity == fingerprint.data_identity("mimic", tmp_path / "b")
    (tmp_path / "b" / "notes of mine.txt").write_text("not part of it")
    assert identity == fingerprint.data_identity("mimic", tmp_path / "b")
    (tmp_path / "b" / "labels.csv").write_text("study_id\n1\n" + "2\n" * 99_999 + "3\n")
    assert identity != fingerprint.data_identity("mimic", tmp_path / "b")


def test_quick_hash_sees_size_head_and_tail(tmp_path):
    path, content = tmp_path / "x", bytes(1_000_000)
    seen = set()
    for changed in (content, content[:-1], b"1" + content[1:], content[:-1] + b"1", b""):
        path.write_bytes(changed)
        seen.add(quick_hash(path))
    assert len(seen) == 5
