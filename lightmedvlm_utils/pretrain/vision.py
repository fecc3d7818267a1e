"""Pretrain the small Swin on phantoms: per-finding presence, kind and place.

An ImageNet encoder arrives with features for objects; this one gets features for findings, from phantom patients
that no course run ever draws (`FIRST_SEED`). The place of a finding is taught token by token: each of the 7 x 7
tokens predicts which findings' masks it touches. That needs far fewer images than labels alone.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import affine_grid, binary_cross_entropy_with_logits, grid_sample

from lightmedvlm_utils.config import FINDINGS
from lightmedvlm_utils.phantom.images import render
from lightmedvlm_utils.phantom.patients import sample_patients, true_states
from lightmedvlm_utils.runs import atomic_path, write_json

FIRST_SEED = 1_000_000  # course runs use small seeds
IMAGE_SIZE, STORED_SIZE, GRID = 112, 128, 7
ARCHITECTURE = "swin_tiny_patch4_window7_224"
ARGUMENTS = {"img_size": IMAGE_SIZE, "embed_dim": 32, "depths": [2, 2, 6], "num_heads": [2, 4, 8]}
MEAN, STD = (0.45,) * 3, (0.25,) * 3
_CHUNK = 250  # patients


def render_chunk(folder: Path, chunk: int, render_size: int = 256) -> Path:
    """Render the frontal view of every study of one chunk of patients to `folder/chunk_NNNN.npz`; skips one that is
    there. Holds `images` (n, 128, 128) uint8, `masks` (n, 13, 32, 32) bool, `states` (n, 13), `kinds`."""
    path = Path(folder) / f"chunk_{chunk:04d}.npz"
    if path.exists():
        return path
    images, masks, states, kinds = [], [], [], []
    for patient in sample_patients(_CHUNK, FIRST_SEED + chunk):
        for study in patient.studies:
            view = next(v for v in study.views if v.position != "LATERAL")
            image, finding_masks = render(study, view, render_size)
            images.append(np.asarray(Image.fromarray(image).resize((STORED_SIZE,) * 2, Image.Resampling.BILINEAR)))
            masks.append(np.stack([_shrink(finding_masks.get(label), 32) for label in FINDINGS]))
            truth = true_states(study)
            states.append([truth[label].state for label in FINDINGS])
            kinds.append("|".join(finding.kind for finding in study.findings if finding.state == 1))
    with atomic_path(path) as temporary:
        np.savez_compressed(
            temporary, images=np.stack(images), masks=np.stack(masks), states=np.array(states), kinds=np.array(kinds)
        )
    return path


def _shrink(mask: np.ndarray | None, size: int) -> np.ndarray:
    """A mask on a coarser grid: true where it touches the cell."""
    if mask is None:
        return np.zeros((size, size), bool)
    step = mask.shape[0] // size
    return mask.reshape(size, step, size, step).any((1, 3))


def render_phantoms(folder: Path, patients: int, workers: int) -> list[Path]:
    """Render the chunks for that many patients in parallel."""
    chunks = range(math.ceil(patients / _CHUNK))
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(render_chunk, [folder] * len(chunks), chunks))


class FindingHeads(nn.Module):
    """What the encoder is asked during pretraining; thrown away afterwards."""

    def __init__(self, width: int, kinds: int):
        super().__init__()
        self.place = nn.Linear(width, len(FINDINGS))
        self.presence = nn.Linear(3 * width, 2 * len(FINDINGS))  # at least borderline, definite
        self.kind = nn.Linear(3 * width, kinds)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> place (B, N, 13), presence (B, 13, 2), kind (B, kinds)."""
        place = self.place(tokens)
        pooled = torch.cat([tokens.mean(1), tokens.amax(1), tokens.amin(1)], -1)
        return place, self.presence(pooled).unflatten(1, (len(FINDINGS), 2)), self.kind(pooled)


def augment(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (B, 128, 128) and masks (B, 13, 32, 32) -> (B, 3, 112, 112) normalized, and token coverage
    (B, N, 13) in 0 to 1, both under the same small random shift, turn, zoom; gray values change too."""
    count = len(images)
    turn = torch.randn(count) * math.radians(4)
    zoom = 1 + torch.randn(count) * 0.05
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = turn.cos() * zoom
    theta[:, 0, 1], theta[:, 1, 0] = -turn.sin() * zoom, turn.sin() * zoom
    theta[:, :, 2] = torch.randn(count, 2) * 0.04
    gray = images[:, None].float() / 255
    fine = affine_grid(theta, (count, 1, IMAGE_SIZE, IMAGE_SIZE), align_corners=False)
    gray = grid_sample(gray, fine, align_corners=False)
    coarse = affine_grid(theta, (count, 1, 4 * GRID, 4 * GRID), align_corners=False)
    covered = grid_sample(masks.float(), coarse, mode="nearest", align_corners=False)
    covered = nn.functional.avg_pool2d(covered, 4).flatten(2).transpose(1, 2)  # (B, N, 13)
    gamma = torch.exp(torch.randn(count, 1, 1, 1) * 0.2)
    gray = gray.clamp(1e-3, 1) ** gamma + torch.randn_like(gray) * 0.01
    return normalize(gray), covered


def normalize(gray: Tensor) -> Tensor:
    """(B, 1, S, S) in 0 to 1 -> (B, 3, S, S) as the encoder wants it."""
    return ((gray - MEAN[0]) / STD[0]).expand(-1, 3, -1, -1)


def pretraining_loss(outputs: tuple[Tensor, Tensor, Tensor], covered: Tensor, states: Tensor, kinds: Tensor) -> Tensor:
    """Sum of the three cross-entropies; a token touched at all counts at least a quarter."""
    place, presence, kind = outputs
    touched = torch.where(covered > 0, covered.clamp(min=0.25) ** 0.5, 0.0)
    wanted = torch.stack([states != 0, states == 1], -1).float()  # (B, 13, 2)
    losses = (
        binary_cross_entropy_with_logits(place, touched),
        binary_cross_entropy_with_logits(presence, wanted),
        binary_cross_entropy_with_logits(kind, kinds),
    )
    return 4 * losses[0] + losses[1] + losses[2]


@torch.no_grad()
def presence_auroc(encoder: nn.Module, heads: FindingHeads, images: Tensor, states: np.ndarray) -> np.ndarray:
    """AUROC of each of the 13 findings (definite against absent) on images (n, 128, 128)."""
    encoder.eval()
    scores = []
    for batch in images.split(128):
        gray = nn.functional.interpolate(
            batch[:, None].float() / 255, size=(IMAGE_SIZE,) * 2, mode="bilinear", antialias=True
        )
        tokens = encoder.forward_features(normalize(gray)).flatten(1, 2)
        scores.append(heads(tokens)[1][..., 0])
    encoder.train()
    scores = torch.cat(scores).numpy()
    return np.array(
        [roc_auc_score(states[states[:, i] >= 0, i] == 1, scores[states[:, i] >= 0, i]) for i in range(len(FINDINGS))]
    )


def pretrain_vision(target: Path, cache: Path, minutes: float, batch_size: int = 32, peak: float = 1e-3) -> dict:
    """Train for `minutes` on the chunks in `cache` (the last one is held out) and write the encoder to `target`.

    The cosine schedule follows the clock, so that the last step is the best one on any machine; the number of images
    seen and the held-out AUROC are recorded in the returned dict and beside the weights.
    """
    torch.manual_seed(0)
    paths = sorted(Path(cache).glob("chunk_*.npz"))
    train, held_out = _load(paths[:-1]), _load(paths[-1:])
    vocabulary = sorted({kind for kinds in train["kinds"] for kind in kinds.split("|") if kind})
    kinds = torch.tensor([[float(k in row.split("|")) for k in vocabulary] for row in train["kinds"]])
    images, masks = torch.from_numpy(train["images"]), torch.from_numpy(train["masks"])
    states = torch.from_numpy(train["states"])
    encoder = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, drop_path_rate=0.05, **ARGUMENTS)
    heads = FindingHeads(encoder.num_features, len(vocabulary))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.05)
    started, seen, reported = time.monotonic(), 0, 0.0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for row in torch.randperm(len(images)).split(batch_size):
            progress = min(1.0, (time.monotonic() - started) / (60 * minutes))
            rate = peak * min(1, (seen + batch_size) / 6400) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixels, covered = augment(images[row], masks[row])
            tokens = encoder.forward_features(pixels).flatten(1, 2)
            loss = pretraining_loss(heads(tokens), covered, states[row], kinds[row])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen += len(row)
            if progress >= 1:
                break
            if progress - reported > 0.04:
                reported = progress
                scores = presence_auroc(encoder, heads, torch.from_numpy(held_out["images"]), held_out["states"])
                _write(encoder, target, {"images_seen": seen, "held_out_auroc": scores.mean().item()})
                print(
                    f"{progress:4.0%}  {seen:7d} images  loss {loss.item():.3f}  AUROC {scores.mean():.3f}", flush=True
                )
    scores = presence_auroc(encoder, heads, torch.from_numpy(held_out["images"]), held_out["states"])
    record = {
        "images_seen": seen,
        "minutes": minutes,
        "training_images": len(images),
        "held_out_auroc": round(float(scores.mean()), 4),
        "held_out_auroc_by_finding": dict(zip(FINDINGS, scores.round(4).tolist(), strict=True)),
    }
    _write(encoder, target, record)
    return record


def _load(paths: list[Path]) -> dict[str, np.ndarray]:
    parts = [dict(np.load(path)) for path in paths]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write(encoder: nn.Module, target: Path, record: dict) -> None:
    """Half precision halves the file; the encoder is read back to float32."""
    Path(target).mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in encoder.state_dict().items()
    }
    with atomic_path(Path(target) / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    config = {"architecture": ARCHITECTURE, "arguments": ARGUMENTS, "mean": MEAN, "std": STD, "pretraining": record}
    write_json(Path(target) / "config.json", config)
