"""Use a trained model: reports, answers with probabilities, per-finding probabilities and attention maps.

Nothing else in the project decodes text. An image is a path, a gray array (H, W) in 0 to 1, a list of either (the
views of one study), what `Reporter.features` has made of it, or the encoder's tokens (N, C).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightmedvlm_utils.data.questions import is_closed
from lightmedvlm_utils.data.reports import split_report as split_report  # with the reports it splits
from lightmedvlm_utils.device import Precision, choose_device
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import outputs_root
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import Processor, as_views


class StudyFeatures(tuple[Tensor, ...]):
    """What a connector reads of one study: the outputs (H, W, C) of the encoder's last stages, fine to coarse."""

    @property
    def tokens(self) -> Tensor:
        """(N, C): the encoder's own output."""
        return self[-1].flatten(0, -2).float()

    @classmethod
    def mean(cls, studies: Sequence[StudyFeatures]) -> StudyFeatures:
        """The average study."""
        return cls(sum(part.float() for part in stage) / len(studies) for stage in zip(*studies, strict=True))


Image = Path | str | np.ndarray | Sequence | StudyFeatures | Tensor
MOST_ANSWER_TOKENS = 24  # of an open answer: a list of three devices needs 15
MODEL_STEP = "06_stage3_vqa"  # its model has been through all stages and does both tasks


class Answer(NamedTuple):
    """`probability` is that of "yes" against "no" where the question asks for one of them, else that of these words."""

    answer: str
    probability: float


class Reporter:
    """A model and its processor, ready to be asked."""

    def __init__(self, model: LightMedVLM, processor: Processor, precision: Precision = "auto", batch_size: int = 32):
        self.where = choose_device(precision)
        self.model, self.processor = model.to(self.where.device).eval(), processor
        self.batch_size = batch_size

    @property
    def device(self) -> torch.device:
        return self.where.device

    def report(self, images: Sequence[Image], num_beams: int = 1, max_new_tokens: int | None = None) -> list[str]:
        """One report an image, decoded greedily or by beam search."""
        reports = []
        for batch in self._batches(images):
            seen = self._image_tokens(batch)
            prompts = [self.processor.report_prompt(len(tokens)) for tokens in seen]
            length = max_new_tokens or self.processor.max_report_tokens
            output = self._generate(prompts, seen, max_new_tokens=length, num_beams=num_beams)
            reports += self.processor.decode(output.sequences)
        return reports

    def answer(
        self, images: Sequence[Image], questions: Sequence[str], closed: Sequence[bool] | None = None
    ) -> list[Answer]:
        """Answer question i about image i; an image that is asked several times is looked at once.

        A `closed` question (by default one that `is_closed`) gets yes or no, from the first token's probabilities
        alone: one forward pass, and never an answer that must be interpreted. Any other gets the words that the model
        writes, decoded greedily.
        """
        answers: list[Answer | None] = [None] * len(questions)
        kinds = list(map(is_closed, questions)) if closed is None else closed
        every = list(zip(range(len(questions)), self._image_tokens(images), questions, kinds, strict=True))
        for respond, kind in ((self._yes_or_no, True), (self._in_words, False)):
            for batch in self._batches([one for one in every if bool(one[3]) == kind]):
                places, seen, asked, _ = zip(*batch, strict=True)
                counts = zip(asked, map(len, seen), strict=True)
                prompts = [self.processor.question_prompt(question, views, kind) for question, views in counts]
                for place, answer in zip(places, respond(prompts, seen), strict=True):
                    answers[place] = answer
        return [answer for answer in answers if answer is not None]

    @torch.inference_mode()
    def _image_tokens(self, images: Sequence[Image]) -> list[Tensor]:
        """The connector's tokens (V, Q, D) of each study: V is the number of its views where they stand side by side,
        else 1. One that occurs again is not computed again."""
        known: dict[Any, Tensor] = {}
        keys = [image if isinstance(image, (str, Path)) else id(image) for image in images]
        different = dict(zip(keys, images, strict=True))
        for batch in self._batches(list(different.items())):
            inputs = self._inputs([image for _, image in batch])
            with self.where.autocast():
                tokens = self.model.image_tokens(**self.where.move(inputs))
            assert tokens is not None  # there are images
            counts = inputs["view_mask"].sum(1).tolist() if len(tokens) != len(batch) else [1] * len(batch)
            known |= {key: of_one for (key, _), of_one in zip(batch, tokens.split(counts), strict=True)}
        return [known[key] for key in keys]

    @torch.inference_mode()
    def _yes_or_no(self, prompts: list[str], seen: Sequence[Tensor]) -> list[Answer]:
        with self.where.autocast():
            text = self.processor.for_generation(prompts)
            logits = self.model(**self.where.move(text), image_embeds=torch.cat(list(seen))).logits[:, -1]
        probabilities = logits[:, self.processor.answer_ids()].float().softmax(-1)[:, 0].tolist()
        return [Answer("yes" if p >= 0.5 else "no", p) for p in probabilities]

    def _in_words(self, prompts: list[str], seen: Sequence[Tensor]) -> list[Answer]:
        output = self._generate(prompts, seen, max_new_tokens=MOST_ANSWER_TOKENS, output_logits=True)
        ids = output.sequences  # (B, T)
        logits = torch.stack(output.logits, 1).float().log_softmax(-1)  # (B, T, vocabulary)
        is_end = (ids == self.processor.end_id).long()
        written = is_end.cumsum(1) - is_end == 0  # up to the first end of the turn, which counts
        probability = (logits.gather(-1, ids[..., None])[..., 0] * written).sum(1).exp()
        return list(map(Answer, self.processor.decode(ids), probability.tolist()))

    @torch.inference_mode()
    def _generate(self, prompts: list[str], seen: Sequence[Tensor], **options) -> Any:
        """What transformers' `generate` returns, without sampling; its `sequences` (B, T) without the prompts."""
        text = self.processor.for_generation(prompts)
        with self.where.autocast():
            output: Any = self.model.generate(
                **self.where.move(text),
                image_embeds=torch.cat(list(seen)),
                **options,
                do_sample=False,
                eos_token_id=self.processor.end_id,
                pad_token_id=self.processor.padding_id,
                return_dict_in_generate=True,
            )
        output.sequences = output.sequences[:, text["input_ids"].shape[1] :]
        return output

    @torch.inference_mode()
    def findings(self, images: Sequence[Image]) -> np.ndarray:
        """(n, 14) probabilities of the labels, from the connector's disease queries alone; UserError without any."""
        rows = []
        for batch in self._batches(images):
            inputs = self.where.move(self._inputs(batch))
            with self.where.autocast():
                features = inputs.get("image_features") or self.model.encode_images(**inputs)
                rows.append(self.model.disease_logits(features, inputs.get("view_mask")).float().sigmoid().cpu())
        return torch.cat(rows).numpy()

    @torch.inference_mode()
    def attention(self, image: Image) -> dict[str, np.ndarray]:
        """Where each disease query looks: label -> (H, W) map that sums to 1; of views side by side the first.

        Raises UserError for a connector without attention maps."""
        with self.where.autocast():
            maps = self.model.attention_maps(**self.where.move(self._inputs([image])))[0]  # (Q, H, W)
        return dict(zip(self.model.connector.token_labels, maps.float().cpu().numpy(), strict=False))

    def features(self, images: Sequence[Image]) -> list[StudyFeatures]:
        """What the connector reads of each image: compute it once where an image is asked many times.

        Raises UserError for a model that takes views side by side: then a study has no one set of tokens.
        """
        return [
            StudyFeatures(stages)
            for batch in self.encoded(images)
            for stages in zip(*(stage.float() for stage in batch), strict=True)
        ]

    @torch.inference_mode()
    def encoded(self, images: Sequence[Image]) -> Iterator[tuple[Tensor, ...]]:
        """The encoder's last stages (B, H, W, C), as many as the connector reads, on the CPU, batch by batch; UserError
        as for `features`."""
        if self.model.config.views != "mean":
            raise UserError("Features are kept for models that average a study's views; give this one the images.")
        for batch in self._batches(images):
            with self.where.autocast():
                stages = self.model.encoded_stages(**self.where.move(self._inputs(batch)))
            yield tuple(stage.cpu() for stage in stages)

    def _inputs(self, images: Sequence[Image]) -> dict[str, Any]:
        features = [_stages(image) for image in images if isinstance(image, (StudyFeatures, Tensor))]
        pictures = [as_views(image) for image in images if not isinstance(image, (StudyFeatures, Tensor))]
        if features and pictures:
            raise UserError("Some images of a batch are files or arrays and others features; give one kind at a time.")
        if not features:
            return self.processor.images(pictures)
        return {"image_features": tuple(torch.stack(stage).float() for stage in zip(*features, strict=True))}

    def _batches(self, items: Sequence) -> Iterator[list]:
        for start in range(0, len(items), self.batch_size):
            yield list(items[start : start + self.batch_size])


def _stages(features: StudyFeatures | Tensor) -> tuple[Tensor, ...]:
    return (features,) if isinstance(features, Tensor) else features


def load(folder: Path | str | None = None, **options) -> Reporter:
    """A Reporter for a checkpoint folder, or for the newest trained run; `options` go to Reporter."""
    folder = Path(folder) if folder else newest_model()
    if not folder.is_dir():
        raise UserError(
            f"There is no model folder {folder}; give the folder of a checkpoint, or train one with `make run`."
        )
    return Reporter(LightMedVLM.from_pretrained(folder), Processor.from_pretrained(folder), **options)


def newest_model() -> Path:
    """The model folder of the run that finished its last training stage most recently.

    Raises UserError that says which command makes one.
    """
    manifests = sorted(outputs_root().glob(f"*/{MODEL_STEP}/manifest.json"), key=lambda p: p.stat().st_mtime)
    for manifest in reversed(manifests):
        folder = manifest.parent / json.loads(manifest.read_text())["parameters"]["connectors"][0]
        if folder.is_dir():
            return folder
    raise UserError(
        f"No trained model was found under {outputs_root()}; `make run` (or `lightmedvlm run`) trains one, or name a "
        "checkpoint folder with --model."
    )
