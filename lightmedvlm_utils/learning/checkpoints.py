"""States of a training that has not ended, so that one that was killed goes on and ends as if it had not been.

A state is one file, written beside the old ones, flushed to the disk and renamed: it is whole or it is not there. Two
are kept, since a disk can break a file that was whole.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import atomic_path

KEPT = 2
_ABOUT = "about"


class Checkpoints:
    """States in a folder, written at most every `minutes`; those of another `made_from` are no use and are removed."""

    def __init__(self, folder: Path, made_from: str, minutes: float = 10.0):
        self.folder, self.made_from, self.minutes = Path(folder), made_from, minutes
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next state."""
        return time.monotonic() - self._last >= 60 * self.minutes

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a state. Raises UserError where the disk is full or broken; the earlier states stay as they are."""
        text = json.dumps({"made_from": self.made_from, **about})
        try:
            with atomic_path(self.folder / f"step-{step:09d}.safetensors") as temporary:
                save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, {_ABOUT: text})
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The state of step {step} cannot be written to {self.folder} ({error}); free space, and the same "
                "command goes on from the state before."
            ) from error
        for old in self._paths()[KEPT:]:
            old.unlink(missing_ok=True)
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole state and what was said about it; None where there is none."""
        for path in self._paths():
            try:
                with safe_open(path, "pt") as file:
                    about = json.loads(file.metadata()[_ABOUT])
                    if about["made_from"] == self.made_from:
                        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                print(f"{path} is damaged ({type(error).__name__}); going on from an earlier state.")
            path.unlink(missing_ok=True)
        return None

    def clear(self) -> None:
        """Forget all states."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)


# ------------------------------------------------------------------------------------------ what a state holds


def learned_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What training changes: parameters that learn, every buffer, the optimizer's moments, torch's generators."""
    found = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found |= {f"buffer.{name}": value for name, value in model.named_buffers()}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    found["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        found["random.cuda"] = torch.cuda.get_rng_state()
    return found


@torch.no_grad()
def restore_tensors(saved: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `learned_tensors` took."""
    for prefix, named in (("model", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, value in named:
            if f"{prefix}.{name}" in saved:
                value.copy_(saved[f"{prefix}.{name}"])
    for index, parameter in enumerate(_parameters(optimizer)):
        start = f"optimizer.{index}."
        state = {name.removeprefix(start): value for name, value in saved.items() if name.startswith(start)}
        if state:  # the count of steps stays on the CPU, as AdamW has it
            optimizer.state[parameter] = {
                name: value.clone() if name == "step" else value.to(parameter.device) for name, value in state.items()
            }
    torch.set_rng_state(saved["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in saved:
        torch.cuda.set_rng_state(saved["random.cuda"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def generator_state(rng: np.random.Generator) -> dict[str, Any]:
    """A NumPy generator's state, as JSON has it."""
    return dict(rng.bit_generator.state)


# ------------------------------------------------------------------------------------------ being told to stop


class Stop:
    """Whether this process has been told to end (SIGTERM: Slurm before the wall time, `docker stop`, a shutdown)."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """While it is open SIGTERM ends nothing by itself but is noted, so that a state can be saved first."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def note(*_: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(step: int, steps: int, saved: bool) -> UserError:
    """The sentence for a training that was told to stop."""
    what = "its state is saved, and the same command goes on from there" if saved else "nothing of it was kept"
    return UserError(f"Training was told to stop (SIGTERM) after step {step} of {steps}; {what}.")
