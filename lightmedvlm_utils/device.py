"""Where the model runs, in which precision, and from which seed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Device(NamedTuple):
    """Where to compute. `dtype` is what matrix products run in under `autocast`; weights stay float32."""

    device: torch.device
    dtype: torch.dtype
    reason: str  # for people: what was found, and what follows

    def autocast(self) -> AbstractContextManager:
        """Mixed precision; does nothing in float32."""
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def move(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device: its tensors, and those in its tuples."""
        return {name: self._moved(value) for name, value in batch.items()}

    def _moved(self, value: Any) -> Any:
        if isinstance(value, tuple):
            parts = [self._moved(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value if value is None else value.to(self.device)


def choose_device(precision: Precision = "auto") -> Device:
    """CUDA first, then Apple's MPS, then the CPU; `"auto"` is the best precision that the device has."""
    import torch

    if torch.cuda.is_available():
        device, name = torch.device("cuda"), torch.cuda.get_device_name()
        # bfloat16 keeps float32's range and needs no loss scaling; cards before Ampere (a T4) lack it.
        best = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    elif torch.backends.mps.is_available():
        device, name, best = torch.device("mps"), "Apple GPU", torch.float32
    else:
        device, name, best = torch.device("cpu"), "no GPU was found", torch.float32
    dtype = best if precision == "auto" else getattr(torch, precision)
    return Device(device, dtype, f"{device.type} ({name}), {str(dtype).removeprefix('torch.')}")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
