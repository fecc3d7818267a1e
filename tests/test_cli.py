"""The command line as a person or a program meets it: what it prints where, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightmedvlm_utils.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def image(tmp_path) -> str:
    pixels = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "chest.png")
    return str(tmp_path / "chest.png")


@pytest.fixture
def checkpoint(make_model, tmp_path) -> str:
    """A random model in a checkpoint folder: it says nonsense, but through the real path."""
    model, processor = make_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def refused(arguments: list, capsys) -> str:
    """Run a command that must be refused; returns its one sentence."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_report(image, checkpoint, capsys):
    assert main(["report", "--image", image, "--model", checkpoint]) == 0
    assert "Not for clinical use" in capsys.readouterr().err
    assert main(["report", "--image", image, "--model", checkpoint, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"images", "model", "findings", "impression", "notice"} == set(record)


def test_report_into_a_file(image, checkpoint, tmp_path, capsys):
    output = tmp_path / "report.txt"
    assert main(["report", "--image", image, "--model", checkpoint, "--output", str(output)]) == 0
    assert output.exists() and capsys.readouterr().out == ""


def test_vqa(image, checkpoint, capsys):
    questions = ["Is there a pneumothorax?", "Is there an effusion?"]
    options = [part for question in questions for part in ("--question", question)]
    assert main(["vqa", "--image", image, "--model", checkpoint, *options, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["question"] for answer in answers] == questions
    for answer in answers:
        assert answer["answer"] == ("yes" if answer["probability_of_yes"] >= 0.5 else "no")
    assert main(["vqa", "--image", image, "--model", checkpoint, *options]) == 0
    assert capsys.readouterr().out.count("probability of yes") == 2


def test_mistakes_are_refused_in_one_sentence(image, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTMEDVLM_OUTPUTS", str(tmp_path / "outputs"))
    folder, text = tmp_path / "folder", tmp_path / "notes.txt"
    folder.mkdir()
    text.write_text("The lungs are clear.")
    report = ["report", "--model", checkpoint, "--image"]
    assert "does not exist" in refused([*report, tmp_path / "missing.png"], capsys)
    assert "is a folder" in refused([*report, folder], capsys)
    assert str(text) in refused([*report, text], capsys)
    assert "is a folder" in refused([*report, image, "--output", folder], capsys)
    assert "does not exist" in refused([*report, image, "--output", folder / "none" / "report.txt"], capsys)
    assert "lightmedvlm run" in refused(["report", "--image", image], capsys)
    assert "no model folder" in refused(["report", "--image", image, "--model", folder / "none"], capsys)
    assert "checkpoint" in refused(["report", "--image", image, "--model", folder], capsys)
    assert "empty" in refused(["vqa", "--image", image, "--question", " "], capsys)
    assert "twice" in refused(["run", "-p", "a", 1, "-p", "a", 2], capsys)
    assert list(folder.iterdir()) == []


def test_unknown_option_and_command_exit_with_2(capsys):
    for arguments in ([], ["train"], ["report"], ["run", "--profile", "huge"], ["run", "--epochs", "3"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: lightmedvlm" in capsys.readouterr().err


def test_outputs_folder_that_is_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIGHTMEDVLM_OUTPUTS", str(tmp_path / "file"))
    assert main(["run", "--profile", "smoke"]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
def test_full_disk_leaves_no_half_written_file(image, checkpoint, tmp_path):
    """A file size limit of 0 bytes stands in for a full disk: every write fails."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "from lightmedvlm_utils.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    output = tmp_path / "report.txt"
    command = [sys.executable, "-c", code, "report", "--image", image, "--model", checkpoint, "--output", str(output)]
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "cannot be written" in done.stderr
    assert not list(tmp_path.glob("*report*"))


def test_check_reports_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTMEDVLM_OUTPUTS", str(tmp_path))
    code = main(["check", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (2 if report["problems"] else 0)
    assert report["packages"]["torch"]["installed"] and report["outputs"]["writable"]
    assert report["runs"] == [] and report["model"] is None
    assert main(["check"]) == code
    assert "lightmedvlm run" in capsys.readouterr().out
