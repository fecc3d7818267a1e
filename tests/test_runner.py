"""The runner on small notebooks of its own: order, parameters, skipping, failures, memory, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat import v4
from toy_course import write_notebook

from lightmedvlm_utils.course.kernel import NotebookFailed
from lightmedvlm_utils.course.lessons import discover, read_defaults, resolve_parameters, select
from lightmedvlm_utils.course.runner import format_metrics, run_course
from lightmedvlm_utils.errors import UserError


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A clone with two lessons: the second needs the first and fails where `scale` is 0."""
    (tmp_path / "pyproject.toml").touch()
    write_notebook(tmp_path, "00_first", metrics='{"studies": 3, "loss": 0.12345}')
    write_notebook(
        tmp_path,
        "01_second",
        own='scale = 2\nconnector = "sasa"\nrates = [0.1, 0.2]\n',
        needs=["00_first"],
        body='import sys, os\nprint("to stderr", file=sys.stderr)\nnumber = 7\nnumber / scale',
        metrics='{"python": sys.executable, "cwd": os.getcwd(), "scale": scale, "connector": connector}',
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTMEDVLM_OUTPUTS", raising=False)
    return tmp_path


def run(**options):
    """run_course at smoke; returns (record, what it said)."""
    said = []
    record = run_course("smoke", say=lambda text="", **_: said.append(text), **options)
    return record, "\n".join(said)


def statuses(record) -> list[str]:
    return [step["status"] for step in record["steps"]]


def test_run_skip_and_redo(project, monkeypatch):
    # A global kernelspec that points elsewhere must not win.
    kernels = project / "share" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    spec = {"argv": ["/nonexistent/python"], "display_name": "Python 3", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "share"))

    record, said = run(parameters={"scale": "3"})
    folder = project / "outputs" / "smoke"
    assert statuses(record) == ["done", "done"]
    assert record == json.loads((folder / "run.json").read_text())
    second = record["steps"][1]
    assert second["metrics"]["python"] == sys.executable
    assert second["metrics"]["cwd"] == str(project / "notebooks")
    assert second["metrics"]["scale"] == 3
    assert second["seconds"] > 0 and second["peak_memory_mb"] > 20
    assert "to stderr" in (folder / "notebooks" / "01_second.log").read_text()
    assert (folder / "notebooks" / "00_first.ipynb").exists()
    assert "studies 3, loss 0.123" in said and "peak memory" in said

    assert statuses(run(parameters={"scale": 3})[0]) == ["kept", "kept"]
    assert statuses(run()[0]) == ["kept", "done"]  # the other value of scale
    (folder / "00_first" / "result.txt").unlink()
    assert statuses(run(last="00")[0]) == ["done"]  # a file of it was gone
    assert statuses(run(first="00", last="0", force=True)[0]) == ["done"]


def test_failure_names_cell_error_and_files(project):
    with pytest.raises(NotebookFailed) as caught:
        run(parameters={"scale": 0})
    message = str(caught.value)
    assert not caught.value.expected
    assert "01_second stopped in cell [4], line 4" in message  # the injected parameters are a cell as well
    assert "import sys, os" in message and "number / scale" in message
    assert "ZeroDivisionError: division by zero" in message and "\x1b" not in message
    folder = project / "outputs" / "smoke"
    assert str(folder / "notebooks" / "01_second.ipynb") in message
    assert statuses(json.loads((folder / "run.json").read_text())) == ["done", "failed"]
    assert not (folder / "01_second" / "manifest.json").exists()


def test_missing_step_is_the_notebooks_own_sentence(project):
    with pytest.raises(NotebookFailed, match="run notebook 00_first first") as caught:
        run(first="01")
    assert caught.value.expected and "UserError" not in str(caught.value)


def test_killed_kernel(project):
    write_notebook(project, "02_killed", body="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(NotebookFailed, match="kernel was killed"):
        run(first="02")


def test_notebook_without_manifest_has_not_happened(project):
    path = project / "notebooks" / "02_demo.ipynb"
    write_notebook(project, "02_demo")
    notebook = nbformat.read(path, 4)
    notebook.cells = notebook.cells[:2]
    nbformat.write(notebook, path)
    assert statuses(run(first="02")[0]) == ["done"]
    assert statuses(run(first="02")[0]) == ["done"]


TRAINING = """\
import time
from lightmedvlm_utils.learning.checkpoints import stopped, stopping
with stopping() as stop:
    (step.folder / "training").touch()
    while not stop.asked:
        time.sleep(0.05)
raise stopped(7, 9, saved=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize(
    "number, body, code, words",
    [
        (signal.SIGINT, 'import time\n(step.folder / "training").touch()\ntime.sleep(60)', 130, "Interrupted"),
        (signal.SIGTERM, 'import time\n(step.folder / "training").touch()\ntime.sleep(60)', 143, "told to stop"),
        (signal.SIGTERM, TRAINING, 143, "after step 7 of 9; its state is saved"),
    ],
)
def test_a_signal_leaves_no_kernel_and_lets_a_training_save(project, number, body, code, words):
    write_notebook(project, "02_slow", body=body)
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
    command = [sys.executable, "-m", "lightmedvlm_utils", "run", "--profile", "smoke", "--from", "02"]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=project,
        # A shell that starts the tests in the background makes them ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    running = project / "outputs" / "smoke" / "02_slow" / "training"
    deadline = time.monotonic() + 60
    while not running.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in errors and words in errors, errors
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_a_signal_between_two_runs_does_not_end_the_second(project):
    """What was listening for the first run's kernel is gone with it."""
    run()
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted and statuses(run(force=True)[0]) == ["done", "done"]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"scael": "3"}, "did you mean 'scale'"),
        ({"zzz": "3"}, "connector, rates, scale"),
        ({"scale": "two"}, "takes a int like 2, not 'two'"),
        ({"scale": 2.5}, "not 2.5"),
        ({"rates": "3"}, "takes a list"),
        ({"seed": "3"}, "--seed"),
        ({"data_root": "x"}, "--data-root"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(project, given, words):
    with pytest.raises(UserError, match=words):
        run(parameters=given)
    assert not (project / "outputs").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(first="7"), "no notebook '7'"),
        (dict(first="01", last="00"), "comes after"),
        (dict(dataset="chexpert"), "no data set 'chexpert'"),
        (dict(dataset="mimic", data_root="nowhere"), "not a folder"),
        (dict(run_name="../elsewhere"), "not a plain folder name"),
    ],
)
def test_wrong_options_are_refused(project, options, words):
    with pytest.raises(UserError, match=words):
        run(**options)


def test_selection_accepts_numbers_and_names(project):
    notebooks = discover(project / "notebooks")
    assert [n.name for n in select(notebooks)] == ["00_first", "01_second"]
    for wanted in ("1", "01", "01_second", "01_second.ipynb"):
        assert [n.name for n in select(notebooks, wanted, wanted)] == ["01_second"]


def test_values_reach_the_notebooks_that_know_them(project):
    notebooks = discover(project / "notebooks")
    shared = dict(profile="smoke", seed=4)
    values = resolve_parameters(notebooks, shared, {"rates": "[1, 2.5]", "connector": "mlp"})
    assert "rates" not in values["00_first"] and values["00_first"]["seed"] == 4
    assert values["01_second"]["rates"] == [1, 2.5] and values["01_second"]["connector"] == "mlp"


@pytest.mark.parametrize("source", ["size = 2 * 3", "import os", "a, b = 1, 2"])
def test_parameters_cell_holds_literals_only(tmp_path, source):
    cell = v4.new_code_cell(source)
    cell.metadata["tags"] = ["parameters"]
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "00_x.ipynb")
    with pytest.raises(UserError, match="name = literal"):
        read_defaults(tmp_path / "00_x.ipynb")


def test_metrics_line_shows_the_first_plain_values():
    metrics = dict(table={"a": 1}, loss=0.123456, studies=12, note="x", more=4)
    assert format_metrics(metrics) == "loss 0.123, studies 12, note x"
