"""Images resized once: where the encoder learns, an epoch must not decode every film at its full size again.

One memory-mapped file holds all of them as they are before normalization, gray values of one byte each
(`benchmarks/loading.py` says what that saves).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightmedvlm_utils.data.images import read_image
from lightmedvlm_utils.data.parallel import map_chunks
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import atomic_path, digest
from lightmedvlm_utils.model.processing import Processor

_CHUNK = 64  # images a process reads before it says so
_IMAGES, _DONE = "images.npy", "done.npy"


class ImageCache:
    """The images of `paths` at the size and in the shape that `processor` gives them, in a folder of their own below
    `home`.

    What is there of an earlier call for the same files and shape is kept, so building goes on where it was interrupted.
    """

    def __init__(self, home: Path, paths: Sequence[str], processor: Processor):
        self.paths, self.gray = list(dict.fromkeys(paths)), processor.gray
        self.row = {path: row for row, path in enumerate(self.paths)}
        self.shape = (len(self.paths), *processor.frame)
        made_from = [_identity(path) for path in self.paths], processor.frame, processor.fit, processor.interpolation
        self.folder = Path(home) / digest(made_from)
        self._images: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return int(np.prod(self.shape))

    def build(self, jobs: int | None = -1, say: Callable[[str], None] = print) -> ImageCache:
        """Read what is missing, in parallel. Raises UserError where the disk is too small or images cannot be read."""
        if not (self.folder / _DONE).is_file():
            self._begin()
        done = np.load(self.folder / _DONE, mmap_mode="r")
        missing = np.flatnonzero(done == 0)
        if len(missing):
            what = f"{len(missing):,} of {len(self.paths):,} images once, {self.size / 1e9:.1f} GB"
            say(f"resizing {what}: {self.folder}")
            rows = [(int(row), self.paths[row]) for row in missing]
            chunks = map_chunks(_resize, rows, str(self.folder), self.gray, jobs=jobs, title="images", size=_CHUNK)
            refused = [sentence for sentences in chunks for sentence in sentences]
            if refused:
                raise UserError(f"{len(refused)} images cannot be used; the first: {refused[0]}")
        self._images = np.load(self.folder / _IMAGES, mmap_mode="r")
        return self

    def __getitem__(self, path: str) -> Tensor:
        """(1, H, W) gray values in 0 to 1 of an image, as `Processor.gray` gives them but for rounding."""
        assert self._images is not None, "build it first"
        return torch.from_numpy(self._images[self.row[path]].astype(np.float32))[None] / 255

    def __contains__(self, path: str) -> bool:
        return path in self.row

    def _begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < self.size:
            raise UserError(
                f"The resized images take {self.size / 1e9:.1f} GB, and {self.folder} has {free / 1e9:.1f} GB left; "
                "free space or set image_cache to another folder."
            )
        np.lib.format.open_memmap(self.folder / _IMAGES, "w+", np.uint8, self.shape).flush()
        with atomic_path(self.folder / _DONE) as path:  # the last: a folder without it has not begun
            np.save(path, np.zeros(self.shape[0], np.uint8))


def _identity(path: str) -> tuple[str, int, int]:
    """Stands for a file as it is now: one that is written again is another image. Zeros where it is gone, as reading it
    will say."""
    try:
        state = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, state.st_size, state.st_mtime_ns


def _resize(rows: Sequence[tuple[int, str]], folder: str, gray: Callable[[np.ndarray], Tensor]) -> list[str]:
    """Read the images of these rows into the cache; what cannot be read is returned in sentences."""
    images = np.lib.format.open_memmap(Path(folder) / _IMAGES, "r+")
    done = np.lib.format.open_memmap(Path(folder) / _DONE, "r+")
    side = max(images.shape[1:])
    read, refused = [], []
    for row, path in rows:
        try:
            images[row] = (gray(read_image(path, smallest=2 * side))[0] * 255).round().numpy().astype(np.uint8)
            read.append(row)
        except UserError as error:
            refused.append(str(error))
    images.flush()
    done[read] = 1  # only now: a row that says so is whole
    done.flush()
    return refused
