"""The promises about the code as a whole: imports point downward, light things stay light, nothing private leaks."""

import ast
import re
import subprocess
import sys
import time
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightmedvlm_utils"

# From the bottom up; a part imports only from lower lines or from its own.
LAYERS = (
    ("errors", "observations"),
    ("files", "device"),
    ("config",),
    ("settings",),
    ("data", "evaluation.metrics", "evaluation.bootstrap", "evaluation.systems"),
    ("phantom", "evaluation"),
    ("model", "plots"),
    ("inference", "pretrain"),
    ("learning",),
    ("course.fingerprint", "course.lessons"),
    ("course.steps",),
    ("course.stages", "course.kernel", "course.check", "demo"),
    ("course.runner", "course"),
    ("cli",),
    ("__main__",),
)
NEED_NO_LEDGER = ("model", "phantom", "plots", "data", "evaluation", "learning", "inference")
NEED_TORCH = (
    "model",
    "learning",
    "inference",
    "course.stages",
    "course.measure",
    "pretrain",
    "__main__",
)  # the last runs the program
HEAVY = ("torch", "transformers", "timm", "peft", "umap", "hdbscan", "sklearn", "matplotlib", "pandas", "papermill")
MAX_FUNCTION_LINES = 55


@cache
def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; the package itself is left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(module: str) -> set[str]:
    """Modules of our own package that a module imports anywhere, also inside functions."""
    path, found = modules()[module], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = ("lightmedvlm_utils", *path.relative_to(PACKAGE).parts[:-1])
            base = ".".join([*folder[: len(folder) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    found = {name.removeprefix("lightmedvlm_utils.") for name in found} & set(modules())
    # `from package import module` names both; the module is what is meant.
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


def layer(module: str) -> int:
    for name in (module, ".".join(module.split(".")[:2]), module.split(".")[0]):
        for height, parts in enumerate(LAYERS):
            if name in parts:
                return height
    raise AssertionError(f"{module} has no place in LAYERS; put it there")


def inside(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def test_imports_point_downward():
    for module in modules():
        upward = [name for name in imports(module) if layer(name) > layer(module)]
        assert not upward, f"{module} imports {upward} from a higher layer"


def test_imports_have_no_cycle():
    TopologicalSorter({module: imports(module) for module in modules()}).prepare()


def test_what_computes_knows_nothing_of_the_ledger():
    for module in modules():
        if inside(module, NEED_NO_LEDGER):
            assert not [name for name in imports(module) if name.startswith("course")], f"{module} imports the course"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout


def test_torch_free_modules_import_without_torch():
    light = [f"lightmedvlm_utils.{name}" for name in modules() if not inside(name, NEED_TORCH)]
    code = f"import importlib, sys\nfor name in {light}: importlib.import_module(name)\n"
    loaded = run_python(code + "print(*(set(sys.modules) & {'torch', 'transformers', 'umap', 'hdbscan'}))")
    assert not loaded.split(), f"loaded by importing the torch-free modules: {loaded}"


@pytest.mark.parametrize("command", [[], ["run"], ["config"], ["report"], ["vqa"], ["check"], ["import-thesis"]])
def test_help_answers_at_once(command):
    code = (
        "import sys\nfrom lightmedvlm_utils.cli import main\n"
        f"try: main({[*command, '--help']})\nexcept SystemExit: pass\n"
        f"print('LOADED', *(set(sys.modules) & set({HEAVY})))"
    )
    started = time.monotonic()
    text, _, loaded = run_python(code).partition("LOADED")
    seconds = time.monotonic() - started
    assert "usage: lightmedvlm" in text and not loaded.split(), f"--help loads {loaded}"
    assert seconds < 3, f"--help took {seconds:.1f} s"  # a tenth of a second on a free machine


def test_modules_say_what_they_are_for_and_functions_stay_short():
    for module, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{module} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {lines} lines"


def tracked_texts():
    """(name, text) of every text file in git, or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in names:
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # binary, or deleted in the working tree


LEAKS = {
    "a path of one machine": r"(?<![\w.~}<*])/(?:work|root|kaggle|content|Users/\w+|home/\w+)/\w",
    "an access token": r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|sk-[A-Za-z0-9]{32,})\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "the address of a package index": r"(?m)^\s*--(?:extra-)?index-url|^\s*--find-links",
}


def test_nothing_private_is_tracked():
    found = []
    for name, text in tracked_texts():
        for what, pattern in LEAKS.items():
            found += [f"{name}: {what}: {match[0]}" for match in re.finditer(pattern, text)]
    assert not found, "\n".join(found)


def test_outputs_are_not_tracked():
    stray = [name for name, _ in tracked_texts() if name.startswith("outputs/")]
    assert all(name.startswith("outputs/reference/") or name == "outputs/README.md" for name in stray), stray
