"""One training loop for every stage; what differs between them is data, objective and settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightmedvlm_utils.config import Part, StageSettings
from lightmedvlm_utils.device import Precision, choose_device
from lightmedvlm_utils.learning.checkpoints import (
    Checkpoints,
    generator_state,
    learned_tensors,
    restore_tensors,
    stopped,
    stopping,
)
from lightmedvlm_utils.learning.examples import Example, known_of
from lightmedvlm_utils.learning.features import Store
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import Processor

Batch = dict[str, Any]
PART_MODULES: dict[Part, str] = {
    "vision": "vision_encoder",
    "connector": "connector",
    "detector": "connector.detector",
    "lora": "language_model",
}


@dataclass(frozen=True)
class Objective:
    """What a stage minimizes: how a batch is made of examples, and its losses; `"loss"` is the one that learns."""

    collate: Callable[[Sequence[Example], Store, Processor], Batch]
    losses: Callable[[LightMedVLM, Batch, StageSettings], dict[str, Tensor]]


def make_batch(examples: Sequence[Example], store: Store, processor: Processor) -> Batch:
    """Collate examples: tokens padded on the right, their images or features, what is known of their findings, and who
    is told it."""
    text = processor.for_training([e.prompt for e in examples], [e.target for e in examples])
    told = torch.tensor([example.told for example in examples])
    return text | make_disease_batch(examples, store, processor) | {"told": told}


def make_disease_batch(examples: Sequence[Example], store: Store, processor: Processor) -> Batch:
    """Images or features, and what is known of their findings, without any text."""
    return store([e.study_id for e in examples]) | {"known": known_of(examples)}


def text_losses(model: LightMedVLM, batch: Batch, settings: StageSettings) -> dict[str, Tensor]:
    """The text loss, and `settings.disease_loss` times the disease loss where the connector has one that learns."""
    detector = model.connector.detector
    learns = detector is None or any(p.requires_grad for p in detector.parameters())
    weight = settings.disease_loss if model.connector.has_disease_head and learns else 0.0
    output = model(**batch, disease_weight=weight)
    return {"loss": output.loss, "text_loss": output.text_loss}


def disease_losses(model: LightMedVLM, batch: Batch, settings: StageSettings) -> dict[str, Tensor]:
    """The disease loss alone; the language model does not run."""
    features, view_mask = batch.get("image_features"), batch.get("view_mask")
    if features is None:
        features = model.encode_images(batch["pixel_values"], view_mask)
    return {"loss": model.disease_loss(features, batch["known"], view_mask)}


TEXT = Objective(make_batch, text_losses)
DISEASES = Objective(make_disease_batch, disease_losses)


def batches(
    examples: Sequence[Example],
    store: Store,
    processor: Processor,
    batch_size: int,
    rng: np.random.Generator | None,
    collate: Callable[[Sequence[Example], Store, Processor], Batch] = make_batch,
    skip: int = 0,
) -> Iterator[Batch]:
    """One epoch, without its first `skip` batches. With `rng` in random order, examples of like length together so that
    little is padding; without, in the given order."""
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
    for chunk in chunks[skip:]:
        yield collate([examples[i] for i in chunk], store, processor)


def parameter_groups(model: LightMedVLM, settings: StageSettings) -> list[dict]:
    """Freeze what the stage does not train, and group the rest by learning rate; biases and norms do not decay."""
    rates = settings.rates()
    model.train_only(*(PART_MODULES[part] for part in rates))
    groups: list[dict] = []
    taken: set[nn.Parameter] = set()  # a detector lies inside its connector
    for part, rate in sorted(rates.items(), key=lambda item: -len(PART_MODULES[item[0]])):
        own = [p for p in model.get_submodule(PART_MODULES[part]).parameters() if p.requires_grad]
        trainable = [p for p in own if p not in taken]
        taken |= set(trainable)
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
    precision: Precision = "auto",
    log: Callable[[str], None] = print,
    objective: Objective = TEXT,
    checkpoints: Checkpoints | None = None,
) -> list[dict]:
    """Train in place; returns the history: one record a step `{step, loss, text_loss, ...}`, and one an epoch with
    `validation_loss`, the first of them (epoch 0) from before training.

    Parts that do not learn are frozen and run in evaluation mode, so that not even a running mean moves. With
    `checkpoints` a training that was killed goes on from its last state, and ends with the weights and the history of
    one that was not (bit for bit on a CPU); SIGTERM saves a state and raises UserError.
    """
    where = choose_device(precision)
    model.to(where.device)
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(groups)
    scaler = torch.amp.GradScaler(enabled=where.dtype == torch.float16 and where.device.type == "cuda")
    rng, started = np.random.default_rng(seed), time.monotonic()
    torch.manual_seed(seed)
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    steps = math.ceil(settings.epochs * per_epoch)
    step, epoch, index = 0, 1, 0  # steps done; the epoch under way, from 1; its batches done
    history: list[dict] = []
    saved = checkpoints.load() if checkpoints else None
    if saved is not None:
        tensors, about = saved
        restore_tensors(tensors, model, optimizer)
        scaler.load_state_dict(about["scaler"])
        rng.bit_generator.state = about["generator"]
        step, epoch, index, history = about["step"], about["epoch"], about["index"], about["history"]
        log(f"going on from step {step} of {steps}")
    else:
        history = [{"step": 0, "epoch": 0, **evaluate_loss(model, processor, validation, store, precision)}]

    def save() -> None:
        if checkpoints is not None:
            about = {"step": step, "epoch": epoch, "index": index, "history": history}
            about |= {"generator": order, "scaler": scaler.state_dict()}
            checkpoints.save(step, learned_tensors(model, optimizer), about)

    with stopping() as stop:
        while epoch <= math.ceil(settings.epochs):
            set_training_mode(model)
            order = generator_state(rng)
            for batch in batches(examples, store, processor, settings.batch_size, rng, objective.collate, index):
                if step == steps:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, group["peak"], settings)
                with where.autocast():
                    losses = objective.losses(model, where.move(batch), settings)
                scaler.scale(losses["loss"]).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], settings.gradient_clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step, index = step + 1, index + 1
                history.append({"step": step, **{name: loss.item() for name, loss in losses.items()}})
                history[-1]["gradient_norm"] = norm.item()
                if stop.asked or (checkpoints is not None and checkpoints.due()):
                    save()
                if stop.asked:
                    raise stopped(step, steps, saved=checkpoints is not None)
            save()  # before it is evaluated
            validated = evaluate_loss(model, processor, validation, store, precision)
            history.append({"step": step, "epoch": epoch, **validated})
            log(_progress(history, per_epoch, time.monotonic() - started))
            epoch, index = epoch + 1, 0
    model.eval()
    return history


def _progress(history: Sequence[dict], per_epoch: int, seconds: float) -> str:
    """One line about the epoch that has just ended."""
    recent = np.mean([h.get("text_loss", h["loss"]) for h in history if "loss" in h][-per_epoch:])
    held_out = f", validation loss {history[-1]['validation_loss']:.3f}" if "validation_loss" in history[-1] else ""
    return f"epoch {history[-1]['epoch']}: training loss {recent:.3f}{held_out}, {seconds:.0f} s"


def warm_up_diseases(
    model: LightMedVLM,
    processor: Processor,
    examples: Sequence[Example],
    store: Store,
    settings: StageSettings,
    seed: int = 0,
    precision: Precision = "auto",
    checkpoints: Checkpoints | None = None,
) -> list[float]:
    """Train the connector, or only its detector where it has one, on the disease loss alone, in place; returns the mean
    loss of each epoch.

    An ordinary use of `train` with the stage's `disease_warmup` settings. No text is read and the language model does
    not run, so an epoch takes seconds. Raises UserError for a connector without disease queries.
    """
    warm = replace(
        settings,
        epochs=settings.disease_warmup,
        batch_size=settings.disease_warmup_batch_size,
        learns=("connector",) if model.connector.detector is None else ("detector",),
        connector_lr=settings.disease_warmup_lr,
        weight_decay=settings.disease_warmup_weight_decay,
    )
    options: dict[str, Any] = dict(seed=seed, precision=precision, log=_quiet, objective=DISEASES)
    history = train(model, processor, examples, store, warm, **options, checkpoints=checkpoints)
    losses = [record["loss"] for record in history if "loss" in record]
    per_epoch = math.ceil(len(examples) / warm.batch_size)
    return [float(np.mean(losses[start : start + per_epoch])) for start in range(0, len(losses), per_epoch)]


def _quiet(line: str) -> None:
    """For a log that nobody reads."""


@torch.no_grad()
def evaluate_loss(
    model: LightMedVLM,
    processor: Processor,
    examples: Sequence[Example],
    store: Store,
    precision: Precision = "auto",
    batch_size: int = 64,
) -> dict[str, float]:
    """`{"validation_loss": mean text loss per supervised token}` over the examples; empty without examples."""
    if not examples:
        return {}
    where = choose_device(precision)
    model.to(where.device).eval()
    total = tokens = 0.0
    for batch in batches(examples, store, processor, batch_size, None):
        with where.autocast():
            loss = model(**where.move(batch)).text_loss
        count = (batch["labels"][:, 1:] != -100).sum().item()
        total, tokens = total + loss.item() * count, tokens + count
    return {"validation_loss": total / tokens}


def set_training_mode(model: LightMedVLM) -> None:
    """Training mode for the parts that learn; evaluation mode (no dropout, fixed statistics) for the frozen."""
    model.eval()
    for part in (model.vision_encoder, model.connector, model.language_model):
        part.train(any(p.requires_grad for p in part.parameters()))
    detector = model.connector.detector
    if detector is not None:
        detector.train(any(p.requires_grad for p in detector.parameters()))


def prepare_stage(
    model: LightMedVLM, settings: StageSettings, rank: int, alpha: int, dropout: float, seed: int = 0
) -> int:
    """Give the language model its LoRA adapters where the stage trains it and it has none yet; returns the number
    of parameters that will learn."""
    if "lora" in settings.learns and not lora.has_lora(model.language_model):
        torch.manual_seed(seed)
        lora.add(model.language_model, rank, alpha, dropout)
    parameter_groups(model, settings)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
