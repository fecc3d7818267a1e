"""One training loop for all three stages; what differs between them is data and settings.

The encoder's features are computed once where the encoder is frozen: then an epoch costs only the connector and
the language model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightmedvlm_utils.config import LABELS, StageSettings
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import Processor
from lightmedvlm_utils.runs import atomic_path, device_report


@dataclass
class Example:
    """One thing to learn: a prompt about a study's image, and its answer."""

    study_id: int
    prompt: str
    target: str
    states: np.ndarray  # (14,) label states: 1, 0, -1 or NaN


class FeatureStore:
    """Encoder tokens (N, C) by study, in half precision: 3,000 studies of 49 x 192 take 56 MB."""

    def __init__(self, study_ids: Sequence[int], features: Tensor):
        self.features = features
        self.row = {int(study_id): row for row, study_id in enumerate(study_ids)}

    def __len__(self) -> int:
        return len(self.row)

    def __call__(self, study_ids: Sequence[int]) -> dict[str, Tensor]:
        """`image_features` (B, N, C) of these studies."""
        rows = [self.row[int(study_id)] for study_id in study_ids]
        return {"image_features": self.features[rows].float()}

    def save(self, path: Path) -> None:
        ids = torch.tensor(list(self.row))
        with atomic_path(path) as temporary:
            save_file({"study_ids": ids, "features": self.features}, temporary)

    @classmethod
    def load(cls, path: Path) -> FeatureStore:
        saved = load_file(path)
        return cls(saved["study_ids"].tolist(), saved["features"])


class ImageStore:
    """The images of studies, read and transformed when asked for: used where the encoder learns too."""

    def __init__(self, studies: pd.DataFrame, processor: Processor):
        self.paths = {
            int(study_id): [image["path"] for image in images]
            for study_id, images in zip(studies.study_id, studies.images, strict=True)
        }
        self.processor = processor

    def __call__(self, study_ids: Sequence[int]) -> dict[str, Tensor]:
        """`pixel_values` (B, V, 3, S, S) and `view_mask` (B, V) of these studies."""
        return self.processor.images([self.paths[int(study_id)] for study_id in study_ids])


Store = FeatureStore | ImageStore


@torch.no_grad()
def encode_studies(
    model: LightMedVLM, processor: Processor, studies: pd.DataFrame, batch_size: int = 64
) -> FeatureStore:
    """Run the frozen encoder over every study once.

    Raises UserError for a model that takes views side by side: then a study has no one set of tokens.
    """
    if model.config.views != "mean":
        raise UserError("Features are kept for models that average a study's views; give this one the images.")
    device = next(model.parameters()).device
    images, chunks = ImageStore(studies, processor), []
    model.eval()
    for start in range(0, len(studies), batch_size):
        batch = images(studies.study_id.iloc[start : start + batch_size])
        chunks.append(model.encode_images(**{k: v.to(device) for k, v in batch.items()}).half().cpu())
    return FeatureStore(studies.study_id, torch.cat(chunks))


def report_examples(studies: pd.DataFrame, processor: Processor) -> list[Example]:
    """One example a study: the report prompt and the clean report."""
    states = studies[list(LABELS)].to_numpy(dtype=float)
    return [
        Example(int(study_id), processor.report_prompt(views), report, row)
        for study_id, views, report, row in zip(
            studies.study_id, num_views(studies), studies.report, states, strict=True
        )
    ]


def question_examples(questions: pd.DataFrame, studies: pd.DataFrame, processor: Processor) -> list[Example]:
    """One example a question: the yes/no prompt and its answer."""
    states = dict(zip(studies.study_id, studies[list(LABELS)].to_numpy(dtype=float), strict=True))
    views = dict(zip(studies.study_id, num_views(studies), strict=True))
    return [
        Example(
            int(row.study_id),
            processor.question_prompt(row.question, views[row.study_id]),
            row.answer,
            states[row.study_id],
        )
        for row in questions.itertuples()
    ]


def num_views(studies: pd.DataFrame) -> list[int]:
    """Images of each study; 1 where the table does not list them (features computed beforehand)."""
    return [len(images) for images in studies["images"]] if "images" in studies else [1] * len(studies)


def disease_targets(states: np.ndarray) -> Tensor:
    """Label states (B, 14) -> probabilities: present 1, uncertain 0.5, absent or not mentioned 0."""
    return torch.tensor(np.select([states == 1, states == -1], [1.0, 0.5], 0.0), dtype=torch.float32)


def make_batch(examples: Sequence[Example], store: Store, processor: Processor) -> dict[str, Tensor]:
    """Collate examples: tokens padded on the right, their images or features, and the disease targets."""
    batch = processor.for_training([e.prompt for e in examples], [e.target for e in examples])
    batch |= store([e.study_id for e in examples])
    return batch | {"disease_targets": disease_targets(np.stack([e.states for e in examples]))}


def batches(
    examples: Sequence[Example], store: Store, processor: Processor, batch_size: int, rng: np.random.Generator | None
) -> Iterator[dict[str, Tensor]]:
    """One epoch. With `rng` in random order, examples of like length together so that little is padding; without,
    in the given order."""
    order = np.arange(len(examples))
    if rng is not None:
        rng.shuffle(order)
        pool = batch_size * 16
        lengths = np.array([len(e.target) for e in examples])
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if rng is not None:
        rng.shuffle(chunks)
    for chunk in chunks:
        yield make_batch([examples[i] for i in chunk], store, processor)


def parameter_groups(model: LightMedVLM, settings: StageSettings) -> list[dict]:
    """Trainable parameters with their part's learning rate; biases and norms are not decayed."""
    rates = {
        "vision_encoder": settings.vision_lr,
        "connector": settings.connector_lr,
        "language_model": settings.lora_lr,
    }
    model.train_only(*(part for part, rate in rates.items() if rate > 0))
    groups = []
    for part, rate in rates.items():
        trainable = [p for p in getattr(model, part).parameters() if p.requires_grad]
        for decay, members in (
            (settings.weight_decay, [p for p in trainable if p.ndim > 1]),
            (0.0, [p for p in trainable if p.ndim <= 1]),
        ):
            if members:
                groups.append({"params": members, "lr": rate, "peak": rate, "weight_decay": decay})
    return groups


def learning_rate(step: int, steps: int, peak: float, settings: StageSettings) -> float:
    """Linear warm-up, then a half cosine from `peak` to `settings.final_lr`."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.final_lr + (peak - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: LightMedVLM,
    processor: Processor,
    examples: Sequence[Example],
    store: Store,
    settings: StageSettings,
    validation: Sequence[Example] = (),
    seed: int = 0,
    precision: str = "auto",
    log: Callable[[str], None] = print,
) -> list[dict]:
    """Train in place; returns the history: one record a step `{step, epoch, loss, text_loss, ...}`, and one an
    epoch with `validation_loss`, the first of them (epoch 0) from before training.

    Parts whose learning rate is 0 are frozen and run in evaluation mode, so that not even a running mean moves.
    """
    device, dtype, _ = device_report(precision)
    model.to(device)
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(groups)
    scaler = torch.amp.GradScaler(enabled=dtype == torch.float16 and device.type == "cuda")
    rng, started = np.random.default_rng(seed), time.monotonic()
    torch.manual_seed(seed)
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    steps = max(1, round(settings.epochs * per_epoch))
    disease_weight = settings.disease_loss if getattr(model.connector, "has_disease_head", False) else 0.0
    history = [{"step": 0, "epoch": 0, **evaluate_loss(model, processor, validation, store, precision)}]
    step = 0
    while step < steps:
        set_training_mode(model)
        for batch in batches(examples, store, processor, settings.batch_size, rng):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, group["peak"], settings)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model(**_to(batch, device), disease_weight=disease_weight)
            scaler.scale(output.loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], settings.gradient_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            history.append({"step": step, "loss": output.loss.item(), "text_loss": output.text_loss.item()})
            history[-1]["gradient_norm"] = norm.item()
            if step == steps:
                break
        epoch = math.ceil(step / per_epoch)
        history.append({"step": step, "epoch": epoch, **evaluate_loss(model, processor, validation, store, precision)})
        recent = np.mean([h["text_loss"] for h in history if "text_loss" in h][-per_epoch:])
        held_out = history[-1].get("validation_loss", math.nan)
        seconds = time.monotonic() - started
        log(f"epoch {epoch}: training loss {recent:.3f}, validation loss {held_out:.3f}, {seconds:.0f} s")
    model.eval()
    return history


def warm_up_diseases(
    model: LightMedVLM,
    store: Store,
    studies: pd.DataFrame,
    epochs: int,
    settings: StageSettings,
    seed: int = 0,
    batch_size: int = 32,
    rate: float = 2e-3,
) -> list[float]:
    """Train SASA alone, on its disease loss alone, in place; returns the mean loss of each epoch.

    No text is read and the language model does not run, so an epoch takes seconds. `studies` holds study_id and the
    14 labels; the learning rate rises to `rate` and falls as `settings` say. Raises UserError for a model without
    disease queries.
    """
    if not getattr(model.connector, "has_disease_head", False):
        raise UserError("Only SASA has disease queries to warm up; the plain projector and thesis checkpoints do not.")
    device = next(model.parameters()).device
    targets = disease_targets(studies[list(LABELS)].to_numpy(dtype=float)).to(device)
    study_ids = studies.study_id.to_numpy()
    optimizer = torch.optim.AdamW(model.connector.parameters(), rate, weight_decay=0.05)
    rng, steps, step, losses = np.random.default_rng(seed), epochs * math.ceil(len(studies) / batch_size), 0, []
    torch.manual_seed(seed)
    model.train_only("connector")
    set_training_mode(model)
    for _ in range(epochs):
        total = 0.0
        for rows in np.split(rng.permutation(len(studies)), range(batch_size, len(studies), batch_size)):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, rate, settings)
            step += 1
            images = _to(store(study_ids[rows]), device)
            loss = model.disease_loss(model.image_tokens(**images), targets[rows], images.get("view_mask"))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.connector.parameters(), settings.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item() * len(rows)
        losses.append(total / len(studies))
    model.eval()
    return losses


@torch.no_grad()
def evaluate_loss(
    model: LightMedVLM,
    processor: Processor,
    examples: Sequence[Example],
    store: Store,
    precision: str = "auto",
    batch_size: int = 64,
) -> dict[str, float]:
    """`{"validation_loss": mean text loss per supervised token}` over the examples; empty without examples."""
    if not examples:
        return {}
    device, dtype, _ = device_report(precision)
    model.to(device).eval()
    total = tokens = 0.0
    for batch in batches(examples, store, processor, batch_size, None):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**_to(batch, device)).text_loss
        count = (batch["labels"][:, 1:] != -100).sum().item()
        total, tokens = total + loss.item() * count, tokens + count
    return {"validation_loss": total / tokens}


def set_training_mode(model: LightMedVLM) -> None:
    """Training mode for the parts that learn; evaluation mode (no dropout, fixed statistics) for the frozen."""
    model.eval()
    for part in (model.vision_encoder, model.connector, model.language_model):
        part.train(any(p.requires_grad for p in part.parameters()))


def prepare_stage(
    model: LightMedVLM, settings: StageSettings, rank: int, alpha: int, dropout: float, seed: int = 0
) -> int:
    """Give the language model its LoRA adapters where the stage trains it and it has none yet; returns the number
    of parameters that will learn."""
    if settings.lora_lr > 0 and not lora.has_lora(model.language_model):
        torch.manual_seed(seed)
        lora.add(model.language_model, rank, alpha, dropout)
    parameter_groups(model, settings)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
