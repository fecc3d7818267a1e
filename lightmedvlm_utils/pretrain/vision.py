"""Pretrain the small Swin on phantoms: per-finding presence, kind and place.

An ImageNet encoder arrives with features for objects; this one gets features for findings, from phantom patients
that no course run ever draws (`FIRST_SEED`). The place of a finding is taught token by token after every
stage: each token predicts which findings' masks it touches. That needs far fewer images than labels alone, and the
fine grids of the early stages teach thin things (a tube, a rib's broken end) that fill little of a 7 x 7 token.

Every study has a twin that differs in one finding alone, and both lie in the same batch under the same augmentation:
what the two losses disagree about is that finding, and nothing that only happens to come with it.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import affine_grid, binary_cross_entropy_with_logits, grid_sample, interpolate
from torch.nn.parallel import DistributedDataParallel

from lightmedvlm_utils.files import atomic_path, write_json
from lightmedvlm_utils.model.modeling import encoder_stages
from lightmedvlm_utils.observations import FINDINGS
from lightmedvlm_utils.phantom.images import render
from lightmedvlm_utils.phantom.patients import Study, sample_patients, true_states, with_finding, without_finding
from lightmedvlm_utils.pretrain import FIRST_SEED

IMAGE_SIZE, STORED_SIZE, GRID = 224, 256, 7
ARCHITECTURE = "swin_tiny_patch4_window7_224"
# Patches of 8 pixels give the 28 x 28 tokens that a 112-pixel image gives with patches of 4, for the same arithmetic,
# and see lines of one or two pixels (a pleural line, a rib's broken cortex) that shrinking to 112 pixels wipes out.
ARGUMENTS: dict[str, Any] = {
    "img_size": IMAGE_SIZE,
    "patch_size": 8,
    "embed_dim": 48,
    "depths": [2, 2, 6],
    "num_heads": [2, 4, 8],
}
MEAN, STD = (0.45,) * 3, (0.25,) * 3
_CHUNK = 250  # patients
# How often a twin differs in a finding: what fills few pixels is learned slowly and drawn more often.
_TWIN_WEIGHTS = {"Fracture": 4, "Pleural Other": 4, "Pneumothorax": 4, "Support Devices": 3, "Lung Lesion": 2,
                 "Atelectasis": 2, "Pneumonia": 2}  # fmt: skip


def twin_of(study: Study, rng: np.random.Generator) -> Study:
    """The study with one finding more, or without one that it has."""
    weights = np.array([_TWIN_WEIGHTS.get(label, 1) for label in FINDINGS], float)
    label = FINDINGS[rng.choice(len(FINDINGS), p=weights / weights.sum())]
    if any(finding.label == label for finding in study.findings):
        return without_finding(study, label)
    return with_finding(study, label, int(rng.integers(2**31)))


def render_chunk(folder: Path, chunk: int) -> Path:
    """Render the frontal view of every study of one chunk of patients, each followed by its twin, to
    `folder/twins_NNNN.npz`; skips one that is there. Holds `images` (2n, 256, 256) uint8, `masks` (2n, 13, 32, 32)
    bool, `states` (2n, 13), `kinds`."""
    path = Path(folder) / f"twins_{chunk:04d}.npz"
    if path.exists():
        return path
    images, masks, states, kinds = [], [], [], []
    rng = np.random.default_rng([FIRST_SEED, chunk])
    for patient in sample_patients(_CHUNK, FIRST_SEED + chunk):
        for study in patient.studies:
            view = next(v for v in study.views if v.position != "LATERAL")
            for shown in (study, twin_of(study, rng)):
                image, finding_masks = render(shown, view, STORED_SIZE)
                images.append(image)
                masks.append(np.stack([_shrink(finding_masks.get(label), 32) for label in FINDINGS]))
                truth = true_states(shown)
                states.append([truth[label].state for label in FINDINGS])
                kinds.append("|".join(finding.kind for finding in shown.findings if finding.state == 1))
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
    return np.any(mask.reshape(size, step, size, step), axis=(1, 3))


def render_phantoms(folder: Path, patients: int, workers: int) -> list[Path]:
    """Render the chunks for that many patients in parallel."""
    chunks = range(math.ceil(patients / _CHUNK))
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(render_chunk, [folder] * len(chunks), chunks))


class FindingHeads(nn.Module):
    """What the encoder is asked during pretraining; thrown away afterwards.

    `widths` are the channels of its stages, fine to coarse."""

    def __init__(self, widths: list[int], kinds: int):
        super().__init__()
        width = widths[-1]
        self.norms = nn.ModuleList(nn.LayerNorm(stage_width) for stage_width in widths)
        self.place = nn.ModuleList(nn.Linear(stage_width, len(FINDINGS)) for stage_width in widths)
        self.presence = nn.Linear(3 * width, 2 * len(FINDINGS))  # at least borderline, definite
        self.kind = nn.Linear(3 * width, kinds)

    def forward(self, stages: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Each stage (B, H, W, C) -> places, each (B, H, W, 13), and last the sum of all at the finest grid; presence
        (B, 13, 2); kind (B, kinds)."""
        parts = zip(self.place, self.norms, stages, strict=True)
        places = [head(norm(tokens)) for head, norm, tokens in parts]
        finest = places[0].shape[1:3]
        enlarged = [interpolate(place.permute(0, 3, 1, 2), finest, mode="bilinear") for place in places]
        places.append(torch.stack(enlarged).sum(0).permute(0, 2, 3, 1))
        tokens = stages[-1].flatten(1, 2)
        pooled = torch.cat([tokens.mean(1), tokens.amax(1), tokens.amin(1)], -1)
        return places, self.presence(pooled).unflatten(1, (len(FINDINGS), 2)), self.kind(pooled)


def augment(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (B, 256, 256) and masks (B, 13, 32, 32) -> (B, 3, 224, 224) normalized and masks (B, 13, 28, 28), 0 or
    1, both under the same small random shift, turn, zoom; gray values change too. Rows 2i and 2i + 1, a study and its
    twin, are treated alike."""
    count = len(images)
    twins = -(-count // 2)
    turn = torch.randn(twins) * math.radians(4)
    zoom = 1 + torch.randn(twins) * 0.05
    theta = torch.zeros(twins, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = turn.cos() * zoom
    theta[:, 0, 1], theta[:, 1, 0] = -turn.sin() * zoom, turn.sin() * zoom
    theta[:, :, 2] = torch.randn(twins, 2) * 0.04
    theta = theta.repeat_interleave(2, 0)[:count]
    gray = images[:, None].float() / 255
    fine = affine_grid(theta, [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    gray = grid_sample(gray, fine, align_corners=False)
    coarse = affine_grid(theta, [count, 1, 4 * GRID, 4 * GRID], align_corners=False)
    masks = grid_sample(masks.float(), coarse, mode="nearest", align_corners=False)
    gamma = torch.exp(torch.randn(twins, 1, 1, 1) * 0.2).repeat_interleave(2, 0)[:count]
    gray = gray.clamp(1e-3, 1) ** gamma + torch.randn_like(gray) * 0.01
    return normalize(gray), masks


def normalize(gray: Tensor) -> Tensor:
    """(B, 1, S, S) in 0 to 1 -> (B, 3, S, S) as the encoder wants it."""
    return ((gray - MEAN[0]) / STD[0]).expand(-1, 3, -1, -1)


def pretraining_loss(
    outputs: tuple[list[Tensor], Tensor, Tensor], masks: Tensor, states: Tensor, kinds: Tensor
) -> Tensor:
    """Sum of the cross-entropies of place (at every stage and summed), presence (of the whole image, and of the best
    places) and kind; `masks` (B, 13, 28, 28).

    Positives count more, since a fracture touches one token in a hundred of one image in ten."""
    places, presence, kind = outputs
    rare = masks.new_tensor(4.0)
    loss = binary_cross_entropy_with_logits(
        presence, torch.stack([states != 0, states == 1], -1).float(), pos_weight=masks.new_tensor(2.0)
    )  # (B, 13, 2)
    loss = loss + binary_cross_entropy_with_logits(kind, kinds, pos_weight=rare)
    for place in places:
        _, height, width, _ = place.shape
        covered = nn.functional.adaptive_avg_pool2d(masks, (height, width)).permute(0, 2, 3, 1)  # (B, H, W, 13)
        # A token touched at all counts at least a quarter.
        touched = torch.where(covered > 0, covered.clamp(min=0.25) ** 0.5, 0.0)
        loss = loss + 2 * binary_cross_entropy_with_logits(place, touched, pos_weight=rare)
    evidence = places[-1].flatten(1, 2)  # (B, H * W, 13)
    pooled = evidence.logsumexp(1) - math.log(evidence.shape[1])
    return loss + binary_cross_entropy_with_logits(pooled, (states != 0).float(), pos_weight=masks.new_tensor(2.0))


@torch.no_grad()
def presence_auroc(model: Pretraining, images: Tensor, states: np.ndarray) -> np.ndarray:
    """AUROC of each of the 13 findings (definite against absent) on images (n, 256, 256)."""
    model.eval()
    parts = []
    for batch in images.split(128):
        gray = nn.functional.interpolate(
            batch[:, None].float() / 255, size=(IMAGE_SIZE,) * 2, mode="bilinear", antialias=True
        )
        parts.append(model(normalize(gray))[1].sum(-1))
    model.train()
    scores = torch.cat(parts).numpy()
    return np.array(
        [roc_auc_score(states[states[:, i] >= 0, i] == 1, scores[states[:, i] >= 0, i]) for i in range(len(FINDINGS))]
    )


class Pretraining(nn.Module):
    """Encoder and heads as one module: (B, 3, S, S) -> places, presence and kinds as `FindingHeads` gives them."""

    encoder: Any  # a Swin of timm; torch's types take each of its parts for a tensor or a module

    def __init__(self, encoder: nn.Module, kinds: int):
        super().__init__()
        self.encoder = encoder
        self.heads = FindingHeads([info["num_chs"] for info in self.encoder.feature_info], kinds)

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        with autocast():
            stages = encoder_stages(self.encoder, pixels, len(self.encoder.feature_info))
            places, presence, kind = self.heads(list(stages))
        return [place.float() for place in places], presence.float(), kind.float()


@dataclass(frozen=True)
class VisionRun:
    """How to pretrain: `minutes` of `workers` processes with one thread each, `batch_size` images a step in all, half
    of them the others' twins.

    `start` is a folder written by an earlier run to continue from; its heads are not kept, so they begin anew.
    """

    target: Path
    cache: Path
    minutes: float
    start: Path | None = None
    workers: int = 2
    batch_size: int = 32
    peak: float = 1e-3


def pretrain_vision(run: VisionRun) -> dict:
    """Train on the chunks in `run.cache` (the last one is held out) and write the encoder to `run.target`.

    The cosine schedule follows the clock, so that the last step is the best one on any machine; the images seen and
    the held-out AUROC stand in `config.json` beside the weights, the earlier runs with them, and are returned. A run
    that was stopped goes on from its last state, which lies in `run.cache` and was written twenty times in all.
    """
    paths = sorted(Path(run.cache).glob("twins_*.npz"))
    train, held_out = _load(paths[:-1]), _load(paths[-1:])
    held_out = {name: values[::2] for name, values in held_out.items()}  # patients as they come, without their twins
    vocabulary = sorted({kind for kinds in train["kinds"] for kind in kinds.split("|") if kind})
    train["kinds"] = np.array([[float(k in row.split("|")) for k in vocabulary] for row in train["kinds"]], np.float32)
    tensors = {name: torch.from_numpy(values).share_memory_() for name, values in train.items()}
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (run, tensors, held_out, Path(meeting) / "workers")
        torch.multiprocessing.spawn(_train_worker, arguments, nprocs=run.workers)
    return json.loads((Path(run.target) / "config.json").read_text())["pretraining"]


def _train_worker(rank: int, run: VisionRun, train: dict[str, Tensor], held_out: dict, meeting: Path) -> None:
    """One process of data-parallel training: two with a thread each share two cores better than two threads of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=run.workers)
    torch.manual_seed(0)  # the same weights and the same order of images in every worker
    encoder, earlier = _first_encoder(run.start)
    model = DistributedDataParallel(Pretraining(encoder, train["kinds"].shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.peak, weight_decay=0.05)
    state = TrainingState(run.cache / "state.safetensors", model, optimizer)
    seen, before = state.load()
    order = torch.Generator().manual_seed(seen)
    torch.manual_seed(1 + rank + seen)  # but its own augmentation and dropout
    started, reported, progress = time.monotonic(), before / run.minutes, torch.zeros(1)

    def minutes() -> float:
        return before + (time.monotonic() - started) / 60

    def record() -> None:
        scores = presence_auroc(model.module, torch.from_numpy(held_out["images"]), held_out["states"])
        this = {"images_seen": seen, "minutes": round(minutes(), 1), "training_images": len(train["images"])}
        by_finding = dict(zip(FINDINGS, scores.round(4).tolist(), strict=True))
        written = {"held_out_auroc": round(float(scores.mean()), 4), "held_out_auroc_by_finding": by_finding}
        write(encoder, run.target, {**written, "runs": [*earlier, {**this, "peak_lr": run.peak}]})
        print(f"{progress.item():4.0%}  {seen:7d} images  AUROC {scores.mean():.3f}", flush=True)

    while progress < 1:
        for pairs in torch.randperm(len(train["images"]) // 2, generator=order).split(run.batch_size // 2):
            progress.fill_(minutes() / run.minutes).clamp_(max=1)
            dist.broadcast(progress, 0)  # all stop at the same step
            rate = run.peak * min(1, (seen + 1) / 6400) * 0.5 * (1 + math.cos(math.pi * progress.item()))
            for group in optimizer.param_groups:
                group["lr"] = rate
            if 2 * len(pairs) < run.batch_size:
                continue  # the rest of an epoch: too few for all workers
            own = pairs[rank :: run.workers]
            rows = torch.stack([2 * own, 2 * own + 1], 1).flatten()
            _train_step(model, optimizer, {name: values[rows] for name, values in train.items()})
            seen += 2 * len(pairs)
            if progress >= 1:
                break
            if rank == 0 and progress.item() - reported > 0.05:
                reported = progress.item()
                state.save(seen, minutes())
                record()
    if rank == 0:
        record()
        state.path.unlink(missing_ok=True)
    dist.destroy_process_group()


class TrainingState:
    """What a stopped run needs to go on: weights, heads, the optimizer's moments, and how far it was."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.path, self.model, self.optimizer = path, model, optimizer
        self.parameters = dict(model.named_parameters())

    def save(self, seen: int, minutes: float) -> None:
        moments = {
            f"{name}.{moment}": value
            for name, parameter in self.parameters.items()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }
        with atomic_path(self.path) as temporary:
            about = {"seen": torch.tensor(seen), "minutes": torch.tensor(minutes)}
            save_file({**self.model.state_dict(), **moments, **about}, temporary)

    def load(self) -> tuple[int, float]:
        """The images seen and the minutes spent so far; 0 and 0 where no run was stopped."""
        if not self.path.exists():
            return 0, 0.0
        saved = load_file(self.path)
        self.model.load_state_dict({name: saved[name] for name in self.model.state_dict()})
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {m: saved[f"{name}.{m}"] for m in ("step", "exp_avg", "exp_avg_sq")}
        return int(saved["seen"]), float(saved["minutes"])


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    pixels, masks = augment(batch["images"], batch["masks"])
    pretraining_loss(model(pixels), masks, batch["states"], batch["kinds"]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def autocast() -> torch.autocast:
    """bfloat16 where the processor multiplies it in hardware: nearly twice as fast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def _first_encoder(start: Path | None) -> tuple[nn.Module, list[dict]]:
    """A new encoder, or the one in the folder `start` with the runs that made it."""
    encoder = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, drop_path_rate=0.05, **ARGUMENTS)
    if start is None:
        return encoder, []
    encoder.load_state_dict(load_file(Path(start) / "model.safetensors"))
    return encoder, json.loads((Path(start) / "config.json").read_text())["pretraining"]["runs"]


def _load(paths: list[Path]) -> dict[str, np.ndarray]:
    parts = [dict(np.load(path)) for path in paths]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write(encoder: nn.Module, target: Path, record: dict) -> None:
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
