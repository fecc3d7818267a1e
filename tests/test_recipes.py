"""CONTRIBUTING.md is right: its map is the tree, and each recipe works when it is followed to the letter."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from nbformat import v4
from PIL import Image

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def block(start: str) -> str:
    """The code of the recipe that contains `start`."""
    (found,) = [code for code in BLOCKS if start in code]
    return found


def python(clone: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTMEDVLM_OUTPUTS"}
    environment["PYTHONPATH"] = str(clone)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def add_line(path: Path, before: str, line: str) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count(before) == 1, f"{before!r} in {path.name}"
    path.write_text(source.replace(before, line + before), encoding="utf-8")


def test_the_map_is_the_tree():
    rooms = dict(re.findall(r"^\| `([\w.]+)/?` \| (\S.*) \|$", TEXT, re.MULTILINE))
    package = ROOT / "lightmedvlm_utils"
    tree = {path.name for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(rooms) == tree - {"__init__.py", "__pycache__"}


def test_a_connector(clone):
    (clone / "my_connector.py").write_text(block("# my_connector.py"))
    code = (
        "import torch, my_connector; from lightmedvlm_utils.model import from_backbones; "
        "model, processor = from_backbones(connector='mean', match_output_scale=True); "
        "print(model.image_tokens(image_features=torch.randn(2, 49, model.vision_encoder.num_features)).shape[1])"
    )
    assert python(clone, "-c", code).split() == ["1"]


def test_a_data_set(clone):
    package, films = clone / "lightmedvlm_utils", clone / "films"
    (package / "data/mine.py").write_text(block("# data/mine.py").split("\n", 1)[1])
    config = package / "config.py"
    config.write_text(config.read_text().replace('DATASETS = ("phantom", ', 'DATASETS = ("mine", "phantom", '))
    add_line(
        package / "data/readers.py",
        '    "phantom": (_MIMIC,),',
        '    "mine": (Form(("reports.csv",), "mine", read_mine),),\n',
    )
    add_line(
        package / "data/readers.py",
        "from lightmedvlm_utils.data.mimic",
        "from lightmedvlm_utils.data.mine import read_mine\n",
    )
    films.mkdir()
    text = "FINDINGS: There is a small left pleural effusion.\nIMPRESSION: Effusion."
    splits = ["train"] * 30 + ["validate"] * 5 + ["test"] * 5
    rows = [
        (i, 100 + i, split, text if i % 2 else "FINDINGS: The lungs are clear.\nIMPRESSION: Normal.")
        for i, split in enumerate(splits)
    ]
    pd.DataFrame(rows, columns=["patient", "study", "split", "text"]).to_csv(films / "reports.csv", index=False)
    rng = np.random.default_rng(0)
    for _, study, *_ in rows[1:]:  # the first has no film: listed as skipped
        Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(films / f"{study}.png")
    arguments = ["run", "--profile", "smoke", "--dataset", "mine", "--data-root", str(films), "--to", "01"]
    python(clone, "-m", "lightmedvlm_utils", *arguments)
    studies = pd.read_parquet(clone / "outputs/smoke/01_data_cleaning/studies.parquet")
    assert len(studies) == 40 and studies["Pleural Effusion"].eq(1).sum() == 20
    assert studies["images"].iloc[1][0]["path"] == "101.png"


def test_a_metric(clone):
    evaluation = clone / "lightmedvlm_utils/evaluation"
    add_line(evaluation / "metrics.py", "def meteor_draws", block("def first_word_draws") + "\n\n")
    add_line(evaluation / "scorers.py", "    fact_draws,\n", "    metrics.first_word_draws,\n")
    code = (
        "import json; from lightmedvlm_utils.evaluation.scorers import ReportScorer; "
        "s = ReportScorer(['The heart is big.', 'No edema.'], [1, 2], samples=20); "
        "print(json.dumps(s.records('x', ['The lungs are clear.', 'Edema.'])))"
    )
    (record,) = [r for r in json.loads(python(clone, "-c", code)) if r["metric"] == "first_word"]
    assert record["value"] == 0.5 and record["low"] is not None


def test_a_notebook(clone):
    parameters, opening, closing = re.split(r"^# (?:opens|closes) .*\n", block("09_my_notebook"), flags=re.MULTILINE)
    cells = [v4.new_code_cell(code) for code in (parameters.split("\n", 1)[1], opening, closing)]
    cells[0].metadata["tags"] = ["parameters"]
    shutil.rmtree(clone / "notebooks")
    (clone / "notebooks").mkdir()
    nbformat.write(v4.new_notebook(cells=cells), clone / "notebooks/09_my_notebook.ipynb")
    code = (  # what notebook 01 leaves, in short
        "import pandas as pd; from lightmedvlm_utils.course.steps import start_step; "
        "from lightmedvlm_utils.data.studies import write_study_table; "
        "step = start_step('01_data_cleaning', dict(profile='smoke', dataset='phantom', data_root='', run_name='', "
        "seed=0, force=False, settings={})); table = pd.DataFrame({'study_id': range(9), 'images': [[]] * 9}); "
        "write_study_table(table, step.folder / 'studies.parquet', None); step.finish({}, ['studies.parquet'])"
    )
    python(clone, "-c", code)
    run = ("-m", "lightmedvlm_utils", "run", "--profile", "smoke", "-p", "shown", "5", "--json")
    assert json.loads(python(clone, *run))["steps"][0]["metrics"] == {"studies": 9}
    assert len(pd.read_csv(clone / "outputs/smoke/09_my_notebook/first.csv")) == 5
    assert json.loads(python(clone, *run))["steps"][0]["status"] == "kept"
