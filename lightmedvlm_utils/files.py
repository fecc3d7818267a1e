"""Where files lie, and how they are written: atomically, so that nobody ever reads half of one."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

BACKBONES = Path(__file__).resolve().parent / "backbones"
SHIPPED_BACKBONES: dict[str, dict[str, Path]] = {  # by part and by the name that a profile calls them
    "vision": {"small": BACKBONES / "swin", "small-masked": BACKBONES / "swin-masked"},
    "language_model": {"small": BACKBONES / "qwen3"},
}
_ENDS = 1 << 16  # bytes of a file's head and of its tail that stand for all of it


def project_root() -> Path:
    """The folder that holds `notebooks/` and `pyproject.toml`: from the working directory upwards, else the
    installed package's own checkout, else the working directory."""
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def outputs_root() -> Path:
    """`outputs/` of the project, or the folder named by the environment variable LIGHTMEDVLM_OUTPUTS."""
    return Path(os.environ.get("LIGHTMEDVLM_OUTPUTS") or project_root() / "outputs").resolve()


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` on success and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: Path | str, value: object) -> Path:
    """Write `value` as JSON, atomically; NumPy scalars become plain numbers."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=plain) + "\n")


def write_parquet(frame, path: Path | str) -> Path:
    """Write a pandas DataFrame as parquet, atomically."""
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)
    return Path(path)


def plain(value: object) -> object:
    """What JSON has no form for, as what it has one for: paths, NumPy scalars and arrays."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def digest(value: object) -> str:
    """16 hexadecimal digits that stand for a plain value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_hash(path: Path) -> str:
    """16 hexadecimal digits that stand for every byte of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def quick_hash(path: Path) -> str:
    """16 hexadecimal digits that stand for a file's size, head and tail: enough to tell a table from its next
    release, and a file that was cut from a whole one, without reading gigabytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(max(len(head), size - _ENDS))
        return hashlib.sha256(b"%d:" % size + head + file.read()).hexdigest()[:16]


@lru_cache(maxsize=2000)  # a run asks twice: for its plan, and when a step's turn comes
def code_hash(source: str) -> str:
    """16 hexadecimal digits that stand for what Python source does: its syntax tree, without comments, docstrings
    and layout. Source that is no plain Python (a notebook's magics) stands for itself."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return digest(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return digest(ast.dump(tree))


def file_code_hash(path: Path) -> str:
    """`code_hash` of a source file; computed once for each state of it."""
    state = path.stat()
    return _code_hash_of(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1000)
def _code_hash_of(path: Path, _modified: int, _size: int) -> str:
    return code_hash(path.read_text(encoding="utf-8"))
