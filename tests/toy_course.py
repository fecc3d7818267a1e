"""Small notebooks for tests of the runner and of its ledger."""

from pathlib import Path

import nbformat
from nbformat import v4

SHARED = """\
profile = "laptop"
dataset = "phantom"
data_root = ""
run_name = ""
seed = 0
force = False
settings = {}
"""
START = """\
from lightmedvlm_utils.course.steps import start_step
own = {own}
shared = dict(profile=profile, dataset=dataset, data_root=data_root, run_name=run_name, seed=seed, force=force)
shared["settings"] = settings
step = start_step("{name}", dict(shared, **own), needs={needs})
"""
FINISH = """\
(step.folder / "result.txt").write_text("done")
step.finish({metrics}, ["result.txt"])
"""


def write_notebook(root: Path, name: str, *, own: str = "", needs=(), body: str = "", metrics="{}"):
    names = [line.split("=")[0].strip() for line in own.splitlines()]
    start = START.format(name=name, own="dict(" + ", ".join(f"{n}={n}" for n in names) + ")", needs=list(needs))
    cells = [v4.new_markdown_cell(f"# {name}"), v4.new_code_cell(SHARED + own)]
    cells[1].metadata["tags"] = ["parameters"]
    cells += [v4.new_code_cell(code) for code in (start, body, FINISH.format(metrics=metrics)) if code]
    notebook = v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
