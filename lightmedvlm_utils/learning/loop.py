"""One training loop for every stage; what differs between them is data, objective and settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightmedvlm_utils.config import Part, StageSettings
from lightmedvlm_utils.device import Device, Precision, choose_device
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.learning.checkpoints import (
    Checkpoints,
    Stop,
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
_READ_EVERY = 20  # steps
PART_MODULES: dict[Part, str] = {
    "vision": "vision_encoder",
    "connector": "connector",
    "detector": "connector.detector",
    "lora": "language_model",
}


class Share(NamedTuple):
    """What a micro-batch is of its batch."""

    tokens: float = 1.0  # of the supervised tokens
    examples: float = 1.0


WHOLE = Share()


@dataclass(frozen=True)
class Objective:
    """What a stage minimizes: how a batch is made of examples, and its losses; `"loss"` is the one that learns.

    Losses are means over a batch; those of a micro-batch are weighed by its share, so that their sum is the batch's.
    """

    collate: Callable[[Sequence[Example], Store, Processor], Batch]
    losses: Callable[[LightMedVLM, Batch, StageSettings, Share], dict[str, Tensor]]

    @staticmethod
    def shares(parts: Sequence[Batch]) -> list[Share]:
        """Each micro-batch's share of the whole."""
        if len(parts) == 1:
            return [WHOLE]
        rows = [len(part["known"].states) for part in parts]
        tokens = [int((part["labels"][:, 1:] != -100).sum()) if "labels" in part else 1 for part in parts]
        return [Share(t / max(1, sum(tokens)), r / sum(rows)) for t, r in zip(tokens, rows, strict=True)]


def make_batch(examples: Sequence[Example], store: Store, processor: Processor) -> Batch:
    """Collate examples: tokens padded on the right, their images or features, what is known of their findings, and who
    is told it."""
    text = processor.for_training([e.prompt for e in examples], [e.target for e in examples])
    told = torch.tensor([example.told for example in examples])
    return text | make_disease_batch(examples, store, processor) | {"told": told}


def make_disease_batch(examples: Sequence[Example], store: Store, processor: Processor) -> Batch:
    """Images or features, and what is known of their findings, without any text."""
    return store([e.study_id for e in examples]) | {"known": known_of(examples)}


def text_losses(model: LightMedVLM, batch: Batch, settings: StageSettings, share: Share = WHOLE) -> dict[str, Tensor]:
    """The text loss, and `settings.disease_loss` times the disease loss where the connector has one that learns."""
    detector = model.connector.detector
    learns = detector is None or any(p.requires_grad for p in detector.parameters())
    weight = settings.disease_loss if model.connector.has_disease_head and learns else 0.0
    output = model(**batch, disease_weight=weight)
    if share == WHOLE:
        return {"loss": output.loss, "text_loss": output.text_loss}
    text = output.text_loss * share.tokens
    return {"loss": text + (output.loss - output.text_loss) * share.examples, "text_loss": text}


def disease_losses(
    model: LightMedVLM, batch: Batch, settings: StageSettings, share: Share = WHOLE
) -> dict[str, Tensor]:
    """The disease loss alone; the language model does not run."""
    features, view_mask = batch.get("image_features"), batch.get("view_mask")
    if features is None:
        features = model.encode_images(batch["pixel_values"], view_mask)
    return {"loss": model.disease_loss(features, batch["known"], view_mask) * share.examples}


TEXT = Objective(make_batch, text_losses)
DISEASES = Objective(make_disease_batch, disease_losses)


def epoch_order(examples: Sequence[Example], batch_size: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """The examples of each batch of one epoch, by their index. With `rng` in random order, examples of like length
    together so that little is padding; without, in the given order."""
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
    return chunks


def batches(
    examples: Sequence[Example],
    store: Store,
    processor: Processor,
    batch_size: int,
    rng: np.random.Generator | None,
    collate: Callable[[Sequence[Example], Store, Processor], Batch] = make_batch,
) -> Iterator[Batch]:
    """One epoch of batches, in the order of `epoch_order`."""
    for chunk in epoch_order(examples, batch_size, rng):
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
    """Train in place; returns the history: one record a step `{step, loss, text_loss, ..., gradient_norm}`, and one an
    epoch with `validation_loss`, the first of them (epoch 0) from before training.

    Parts that do not learn are frozen and run in evaluation mode, so that not even a running mean moves. The text loss
    of a step is the mean over all its supervised tokens, however many micro-batches it is computed in. With
    `checkpoints` a training that was killed goes on from its last state, and ends with the weights and the history of
    one that was not (bit for bit on a CPU). Raises UserError where SIGTERM asks it to stop, after saving a state, and
    where a loss or gradient is not finite (`settings.not_finite`).
    """
    where = choose_device(precision)
    model.to(where.device)
    training = _Training(model, processor, examples, store, settings, seed, where, objective, checkpoints)

    def validate(epoch: int) -> None:
        scores = evaluate_loss(model, processor, validation, store, precision)
        training.history.append({"step": training.step, "epoch": epoch, **scores})

    if training.restore():
        log(f"going on from step {training.step} of {training.steps}")
    else:
        validate(0)
    started = time.monotonic()
    with stopping() as stop:
        while training.epoch <= math.ceil(settings.epochs):
            training.run_epoch(stop)
            training.save()  # before it is evaluated
            validate(training.epoch)
            log(_progress(training.history, training.per_epoch, time.monotonic() - started))
            training.epoch, training.index = training.epoch + 1, 0
    model.eval()
    return training.history


class _Training:
    """A training under way: what learns, and how far it is."""

    def __init__(
        self,
        model: LightMedVLM,
        processor: Processor,
        examples: Sequence[Example],
        store: Store,
        settings: StageSettings,
        seed: int,
        where: Device,
        objective: Objective,
        checkpoints: Checkpoints | None,
    ):
        self.model, self.settings, self.where, self.objective = model, settings, where, objective
        self.examples, self.collate = examples, lambda chunk: objective.collate(chunk, store, processor)
        self.groups = parameter_groups(model, settings)
        self.optimizer = torch.optim.AdamW(self.groups)
        self.scaler = torch.amp.GradScaler(enabled=where.dtype == torch.float16 and where.device.type == "cuda")
        self.rng, self.checkpoints = np.random.default_rng(seed), checkpoints
        torch.manual_seed(seed)
        self.per_epoch = math.ceil(len(examples) / settings.batch_size)
        self.steps = math.ceil(settings.epochs * self.per_epoch)
        self.step, self.epoch, self.index = 0, 1, 0  # steps done; the epoch under way, from 1; its batches done
        self.order = generator_state(self.rng)  # the generator as it was when the epoch began
        self.history: list[dict] = []
        self._unread: list[tuple[int, np.ndarray, dict[str, Tensor]]] = []  # steps whose losses are still on the device

    def run_epoch(self, stop: Stop) -> None:
        """The steps that are left of the epoch."""
        set_training_mode(self.model)
        self.order = generator_state(self.rng)
        for chunk in epoch_order(self.examples, self.settings.batch_size, self.rng)[self.index :]:
            if self.step == self.steps:
                break
            self._step(chunk)
            if stop.asked or (self.checkpoints is not None and self.checkpoints.due()):
                self.save()
            if stop.asked:
                raise stopped(self.step, self.steps, saved=self.checkpoints is not None)
        self._read()

    def _step(self, chunk: np.ndarray) -> None:
        """One step of the optimizer on the examples of a batch, in as many micro-batches as the settings say."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, group["peak"], self.settings)
        size = self.settings.micro_batch or len(chunk)
        parts = [self.collate([self.examples[i] for i in chunk[at : at + size]]) for at in range(0, len(chunk), size)]
        losses: dict[str, Tensor] = {}
        skips = self.settings.not_finite == "skip"
        means = {name: value.clone() for name, value in self.model.named_buffers()} if skips else {}
        for batch, share in zip(parts, self.objective.shares(parts), strict=True):
            with self.where.autocast():
                own = self.objective.losses(self.model, self.where.move(batch), self.settings, share)
            self.scaler.scale(own["loss"]).backward()
            losses = {name: losses.get(name, 0) + loss.detach() for name, loss in own.items()}
        self.scaler.unscale_(self.optimizer)
        learning = [parameter for group in self.groups for parameter in group["params"]]
        losses["gradient_norm"] = torch.nn.utils.clip_grad_norm_(learning, self.settings.gradient_clip)
        if not skips or _is_finite(losses):
            self.scaler.step(self.optimizer)
        else:
            for name, value in self.model.named_buffers():  # running means have seen the batch already
                value.copy_(means[name])
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.index = self.step + 1, self.index + 1
        self._unread.append((self.step, chunk, losses))
        if len(self._unread) == _READ_EVERY:
            self._read()

    def _read(self) -> None:
        """Write the losses of the last steps down: reading one waits for the device, so it is not done every step."""
        for step, chunk, losses in self._unread:
            values = {name: value.item() for name, value in losses.items()}
            self.history.append({"step": step, **values})
            if all(map(math.isfinite, values.values())) or (self.scaler.is_enabled() and math.isfinite(values["loss"])):
                continue  # under loss scaling a gradient may overflow: the scaler leaves that step out
            if self.settings.not_finite == "skip":
                self.history[-1]["skipped"] = True
                continue
            what = next(name for name, value in values.items() if not math.isfinite(value)).replace("_", " ")
            raise UserError(
                f"The {what} of step {step} is not finite (studies {', '.join(self._studies(chunk))}); look at these "
                "studies, lower the rate, or set not_finite to 'skip'. The last state saved is from before."
            )
        self._unread.clear()

    def _studies(self, chunk: np.ndarray) -> list[str]:
        return [str(study) for study in dict.fromkeys(self.examples[i].study_id for i in chunk)]

    def save(self) -> None:
        """Write a state; only one whose losses have been read, and were finite, is any good."""
        self._read()
        if self.checkpoints is not None:
            about = {name: getattr(self, name) for name in ("step", "epoch", "index", "history")}
            about |= {"generator": self.order, "scaler": self.scaler.state_dict()}
            self.checkpoints.save(self.step, learned_tensors(self.model, self.optimizer), about)

    def restore(self) -> bool:
        """Go on from the last state, if there is one."""
        saved = self.checkpoints.load() if self.checkpoints is not None else None
        if saved is None:
            return False
        tensors, about = saved
        restore_tensors(tensors, self.model, self.optimizer)
        self.scaler.load_state_dict(about["scaler"])
        self.rng.bit_generator.state = about["generator"]
        self.step, self.epoch, self.index, self.history = (about[n] for n in ("step", "epoch", "index", "history"))
        return True


def _is_finite(losses: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite()) for value in losses.values())


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
