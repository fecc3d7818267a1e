"""Pretrain the small Swin without labels or masks: by filling in what is hidden of an image.

After SimMIM (Xie et al. 2022, arXiv 2111.09886): most squares of the image are replaced by a learned token, and a
linear layer paints the pixels of each from what the encoder makes of the rest. Nothing is said of any finding, as
nothing is said of findings to an encoder from ImageNet; so this is the honest stand-in for one, and `vision.py`'s, told
what and where, is the better. The phantoms are the same, each with its twin.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from lightmedvlm_utils.observations import FINDINGS
from lightmedvlm_utils.pretrain.vision import (
    ARCHITECTURE,
    ARGUMENTS,
    IMAGE_SIZE,
    TrainingState,
    augment,
    autocast,
    write,
)

SQUARE = 16  # pixels
HIDDEN = 0.6  # share of the squares


class MaskedImages(nn.Module):
    """Encoder and painter: (B, 3, S, S) and which squares are hidden (B, S / SQUARE, S / SQUARE), bool -> mean absolute
    error of the hidden pixels."""

    encoder: Any  # a Swin of timm

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        last = encoder.feature_info[-1]
        self.reduction: int = last["reduction"]
        self.patch: int = encoder.patch_embed.patch_size[0]
        self.token = nn.Parameter(torch.zeros(encoder.embed_dim))
        self.paint = nn.Linear(last["num_chs"], self.reduction**2)

    def forward(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        error = (self.painted(pixels, hidden) - pixels[:, :1]).abs()  # the channels are alike
        return error[_enlarged(hidden, SQUARE)[:, None]].mean()

    def painted(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """(B, 1, S, S): the image as the encoder makes it out from what is not hidden."""
        with autocast():
            patches = self.encoder.patch_embed(pixels)  # (B, H, W, C)
            covered = _enlarged(hidden, SQUARE // self.patch)[..., None]
            tokens = self.encoder.norm(self.encoder.layers(torch.where(covered, self.token.to(patches), patches)))
            return nn.functional.pixel_shuffle(self.paint(tokens).permute(0, 3, 1, 2), self.reduction).float()


def _enlarged(grid: Tensor, times: int) -> Tensor:
    return grid.repeat_interleave(times, 1).repeat_interleave(times, 2)


def hide(count: int, generator: torch.Generator) -> Tensor:
    """(count, side, side) bool: HIDDEN of the squares of each image, at random."""
    side = IMAGE_SIZE // SQUARE
    order = torch.rand(count, side * side, generator=generator).argsort(1)
    return (order < round(HIDDEN * side * side)).unflatten(1, (side, side))


@dataclass(frozen=True)
class MaskedRun:
    """How to pretrain: `minutes` with the images in `cache` (`vision.render_phantoms` makes them)."""

    target: Path
    cache: Path
    minutes: float
    batch_size: int = 32
    peak: float = 1e-3


def pretrain_masked(run: MaskedRun) -> dict:
    """Train on the chunks in `run.cache` (the last one is held out) and write the encoder to `run.target`.

    The cosine schedule follows the clock. Images seen and the held-out error, beside that of painting every pixel in
    the mean gray, stand in `config.json` and are returned. A run that was stopped goes on from its last state.
    """
    paths = sorted(Path(run.cache).glob("twins_*.npz"))
    images = torch.from_numpy(np.concatenate([np.load(path)["images"] for path in paths[:-1]]))
    held_out = torch.from_numpy(np.load(paths[-1])["images"][::2])
    torch.manual_seed(0)
    encoder = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, drop_path_rate=0.05, **ARGUMENTS)
    model = MaskedImages(encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.peak, weight_decay=0.05, betas=(0.9, 0.98))
    state = TrainingState(run.cache / "masked.safetensors", model, optimizer)
    seen, before = state.load()
    generator = torch.Generator().manual_seed(seen)
    started, reported = time.monotonic(), before / run.minutes

    def record() -> dict:
        error, plain = held_out_error(model, held_out)
        about = {"images_seen": seen, "minutes": round(minutes, 1), "training_images": len(images), "peak_lr": run.peak}
        found = {"task": "masked images", "held_out_error": round(error, 4), "error_of_mean_gray": round(plain, 4)}
        write(encoder, run.target, {**found, "runs": [about]})
        print(f"{progress:4.0%}  {seen:7d} images  error {error:.4f}, mean gray {plain:.4f}", flush=True)
        return json.loads((Path(run.target) / "config.json").read_text())["pretraining"]

    progress = minutes = 0.0
    while progress < 1:
        for rows in torch.randperm(len(images), generator=generator).split(run.batch_size):
            minutes = before + (time.monotonic() - started) / 60
            progress = min(1.0, minutes / run.minutes)
            rate = run.peak * min(1, (seen + 1) / 6400) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixels, _ = augment(images[rows], torch.zeros(len(rows), len(FINDINGS), 32, 32))
            model(pixels, hide(len(rows), generator)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen += len(rows)
            if progress >= 1:
                break
            if progress - reported > 0.05:
                reported = progress
                state.save(seen, minutes)
                record()
    state.path.unlink(missing_ok=True)
    return record()


@torch.no_grad()
def held_out_error(model: MaskedImages, images: Tensor) -> tuple[float, float]:
    """Mean error of the hidden pixels of images (n, 256, 256) uint8, and that of their mean gray."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    errors, plain = [], []
    for batch in images.split(64):
        pixels, _ = augment(batch, torch.zeros(len(batch), len(FINDINGS), 32, 32))
        hidden = hide(len(batch), generator)
        errors.append(model(pixels, hidden).item())
        shown = pixels[:, :1][_enlarged(hidden, SQUARE)[:, None]]
        plain.append((shown - shown.mean()).abs().mean().item())
    model.train()
    return float(np.mean(errors)), float(np.mean(plain))
