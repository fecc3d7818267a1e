"""Every lesson has the same anatomy, and none is committed with outputs."""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

from lightmedvlm_utils.course.lessons import SHARED, discover

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = (
    "00_setup_and_tour",
    "01_data_cleaning",
    "02_cluster_analysis",
    "03_building_sasa",
    "04_stage1_alignment",
    "05_stage2_report_generation",
    "06_stage3_vqa",
    "07_evaluation",
    "08_demo",
)
HEADINGS = ("At a glance", "Setup", "The question", "What can go wrong", "Save", "Exercises", "Summary")
GLANCE = ("You will learn", "Needs", "Produces", "Time", "Data access")
DEFAULTS = dict(profile="laptop", dataset="phantom", data_root="", run_name="", seed=0, force=False, settings={})
MAX_CELL_LINES = 40
MAX_MEDIAN_LINES = 12
MAX_CODE_LINES = 400
MAX_WORDS = 2500


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(notebook: dict, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def lines(source: str) -> int:
    return sum(bool(line.strip()) for line in source.splitlines())


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return load(FOLDER / f"{name}.ipynb")


def test_the_course_is_complete():
    assert tuple(lesson.name for lesson in discover(FOLDER)) == NAMES


def test_no_outputs_and_a_neutral_kernel():
    for path in FOLDER.rglob("*.ipynb"):
        notebook = load(path)
        for cell in notebook["cells"]:
            assert not cell.get("outputs") and not cell.get("execution_count"), f"{path.name} has outputs"
            assert not cell.get("attachments"), f"{path.name} has attachments"
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert notebook["metadata"]["language_info"]["name"] == "python"
        identifiers = [cell["id"] for cell in notebook["cells"]]
        assert len(identifiers) == len(set(identifiers)), f"{path.name} has cells with one id"


def test_opening(name, notebook):
    first = "".join(notebook["cells"][0]["source"])
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert re.match(rf"# {name[:2]} · \S", first), first[:60]
    assert "→" in first, "the course map is missing"
    glance = "".join(notebook["cells"][1]["source"])
    assert glance.startswith("## At a glance")
    assert all(row in glance for row in GLANCE), [row for row in GLANCE if row not in glance]


def test_sections_are_there_in_order(name, notebook):
    headings = re.findall(r"(?m)^## (.+?)\s*$", "\n".join(sources(notebook, "markdown")))
    wanted = [heading for heading in HEADINGS if (name, heading) != ("08_demo", "Save")]
    assert [heading for heading in headings if heading in wanted] == wanted


def test_parameters(name, notebook):
    (lesson,) = (lesson for lesson in discover(FOLDER) if lesson.name == name)
    assert tuple(lesson.defaults)[: len(SHARED)] == SHARED
    assert {key: lesson.defaults[key] for key in SHARED} == DEFAULTS


def test_step_is_opened_with_every_parameter(name, notebook):
    """A parameter that the manifest does not know would not void the step when it changes."""
    (lesson,) = (lesson for lesson in discover(FOLDER) if lesson.name == name)
    code = "\n".join(sources(notebook, "code"))
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    starts = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) == "start_step"]
    assert len(starts) == 1, "start_step is called once"
    arguments = dict(zip(("name", "parameters", "needs"), starts[0].args, strict=False))
    arguments |= {keyword.arg: keyword.value for keyword in starts[0].keywords}
    assert ast.literal_eval(arguments["name"]) == name
    assert {keyword.arg for keyword in arguments["parameters"].keywords} == set(lesson.defaults)
    for upstream in ast.literal_eval(arguments["needs"]) if "needs" in arguments else ():
        assert upstream in NAMES and upstream < name
    assert "step.finish(" in code


def test_cells_are_small(notebook):
    sizes = [lines(source) for source in sources(notebook, "code")]
    assert max(sizes) <= MAX_CELL_LINES
    assert statistics.median(sizes) <= MAX_MEDIAN_LINES
    assert sum(sizes) <= MAX_CODE_LINES
    assert len(" ".join(sources(notebook, "markdown")).split()) <= MAX_WORDS


def test_ideas_are_checked(notebook):
    assert any("assert " in source for source in sources(notebook, "code"))


def test_exercises_are_three_to_five(notebook):
    text = "\n".join(sources(notebook, "markdown"))
    exercises = text.split("## Exercises")[1].split("\n## ")[0]
    assert 3 <= len(re.findall(r"(?m)^\d+\. ", exercises)) <= 5
