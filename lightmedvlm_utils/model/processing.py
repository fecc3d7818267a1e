"""From files and questions to tensors: the image transform, the chat prompts and the two collators."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from lightmedvlm_utils.data.images import read_image
from lightmedvlm_utils.data.questions import is_closed
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import write_json
from lightmedvlm_utils.model.configuration import LightMedVLMConfig, checkpoint_folder

IMAGE_TOKEN = "<|image_pad|>"  # Qwen3's tokenizer has it already
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"

# The thesis' prompts, word for word.
REPORT_SYSTEM = (
    "You are a professional radiologist. Please generate a comprehensive and detailed diagnosis report for this "
    "chest xray image."
)
REPORT_USER = "The chest X-ray image shows: {image}"
VQA_SYSTEM = (
    "You are a professional radiologist. Please answer the question based on the chest X-ray image and choose "
    "from the following two options: [yes, no]."
)
VQA_USER = "{question} {image}"
# Ours: the thesis asks for yes or no only.
OPEN_SYSTEM = (
    "You are a professional radiologist. Please answer the question based on the chest X-ray image in a few words."
)


def chat_prompt(system: str, user: str) -> str:
    """Qwen's chat format up to the point where the assistant speaks."""
    turns = (("system", system), ("user", user))
    text = "".join(f"<|im_start|>{role}\n{content}{END_OF_TURN}\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a special token; raises UserError for a tokenizer without it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or found == tokenizer.unk_token_id:
        raise UserError(f"The tokenizer has no {token} token; use Qwen3's tokenizer or the shipped one.")
    return found


def as_views(image: Path | str | np.ndarray | Sequence) -> list:
    """One study's views, of a single image (path or gray array) or a list of them."""
    return [image] if isinstance(image, (str, Path, np.ndarray)) else list(image)


class Processor:
    """Image transform, tokenizer and prompts of one model; saved beside its weights.

    `image_size` in pixels, one number or (height, width); `mean`, `std` (grey values 0 to 1) and `interpolation` as in
    the encoder's pretraining (timm's data configuration); `num_image_tokens` = Q of the connector;
    `max_report_tokens` = where training targets are cut; `views` as in LightMedVLMConfig, at most `max_views` of them;
    `fit`: `"pad"` the image to the encoder's shape, cutting nothing off, or `"stretch"` it (thesis).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        num_image_tokens: int,
        max_views: int = 1,
        max_report_tokens: int = 100,
        interpolation: str = "bilinear",
        fit: str = "pad",
        views: str = "mean",
    ):
        self.tokenizer = tokenizer
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.mean, self.std, self.interpolation, self.fit = tuple(mean), tuple(std), interpolation, fit
        self.max_views, self.max_report_tokens, self.views = max_views, max_report_tokens, views
        self._remember()
        self.image_token_id = token_id(tokenizer, IMAGE_TOKEN)
        self.end_id = token_id(tokenizer, END_OF_TURN)
        self.padding_id = token_id(tokenizer, PADDING)

    def _remember(self) -> None:
        """Tokenize a text once: prompts and targets recur every epoch."""
        self._ids = lru_cache(maxsize=20_000)(self._tokenize)
        self._target_ids = lru_cache(maxsize=20_000)(self._cut_target)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: all but what is remembered."""
        return {name: value for name, value in vars(self).items() if name not in ("_ids", "_target_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def __call__(self, images: Sequence, questions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Inputs of the model's `generate`: one report for each image or, with `questions`, one answer for each.

        An image is a path or a gray array (H, W) in 0 to 1, or a list of either: the views of one study.
        """
        inputs = self.images(list(map(as_views, images)))
        counts = inputs["view_mask"].sum(1).tolist()
        if questions is None:
            prompts = [self.report_prompt(count) for count in counts]
        else:
            prompts = [self.question_prompt(*pair) for pair in zip(questions, counts, strict=True)]
        return self.for_generation(prompts) | inputs

    # Images

    def transform(self, image: np.ndarray) -> Tensor:
        """(H, W) grey values in 0 to 1 -> (3, S, S): `gray`, repeated to the encoder's channels and normalized."""
        return self.normalize(self.gray(image))

    def gray(self, image: np.ndarray) -> Tensor:
        """(H, W) grey values in 0 to 1 -> (1, S, S): padded or stretched to the encoder's shape and resized with
        antialiasing."""
        height, width = self.frame
        grey = torch.from_numpy(np.ascontiguousarray(image))[None, None]
        if self.fit == "pad":
            scale = max(grey.shape[2] / height, grey.shape[3] / width)
            down, across = round(height * scale) - grey.shape[2], round(width * scale) - grey.shape[3]
            grey = torch.nn.functional.pad(grey, (across // 2, across - across // 2, down // 2, down - down // 2))
        small = torch.nn.functional.interpolate(grey, size=(height, width), mode=self.interpolation, antialias=True)
        return small[0].clamp(0, 1)  # bicubic filters overshoot

    def normalize(self, gray: Tensor) -> Tensor:
        """(..., 1, S, S) in 0 to 1 -> (..., 3, S, S) with the encoder's mean and standard deviation."""
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return (gray.expand(*gray.shape[:-3], 3, -1, -1) - mean) / std

    def images(self, studies: Sequence[Sequence[Path | str | np.ndarray]]) -> dict[str, Tensor]:
        """Views of B studies, files or gray arrays -> what `stacked` makes of them; at most `max_views` each."""
        shown = [list(views)[: self.max_views] for views in studies]
        read = [[view if isinstance(view, np.ndarray) else read_image(view) for view in views] for views in shown]
        return self.stacked([[self.gray(view) for view in views] for views in read])

    def stacked(self, studies: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Views of B studies as `gray` gives them -> `pixel_values` (B, V, 3, S, S) and `view_mask` (B, V)."""
        if not all(studies):
            raise UserError("A study has no image; drop it from the study table or give its image.")
        most = max(map(len, studies))
        pixels = torch.zeros(len(studies), most, 3, *self.frame)
        mask = torch.zeros(len(studies), most, dtype=torch.bool)
        for row, views in enumerate(studies):
            for column, view in enumerate(views):
                pixels[row, column], mask[row, column] = self.normalize(view), True
        return {"pixel_values": pixels, "view_mask": mask}

    # Text

    def report_prompt(self, num_views: int = 1) -> str:
        return chat_prompt(REPORT_SYSTEM, REPORT_USER.format(image=self._image(num_views)))

    def question_prompt(self, question: str, num_views: int = 1, closed: bool | None = None) -> str:
        """The prompt of a question; a `closed` one, by default one that `is_closed`, asks for yes or no."""
        system = VQA_SYSTEM if (is_closed(question) if closed is None else closed) else OPEN_SYSTEM
        return chat_prompt(system, VQA_USER.format(question=self._plain(question), image=self._image(num_views)))

    def for_training(self, prompts: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
        """Prompts and what to answer -> `input_ids`, `attention_mask`, `labels` (B, T), padded on the right.

        Only the answer and its end-of-turn carry a label; prompt, image and padding have -100 by their role. An
        answer longer than `max_report_tokens` is cut after the last sentence that fits, or hard where none does, and
        ends there: the model learns to say what fits and to stop, never to stop in mid-sentence.
        """
        rows = []
        for prompt, target in zip(prompts, targets, strict=True):
            prompt_ids = self._ids(prompt)
            target_ids = self._target_ids(self._plain(target))
            rows.append((prompt_ids + target_ids, [-100] * len(prompt_ids) + target_ids))
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest), self.padding_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (row_ids, row_labels) in enumerate(rows):
            ids[row, : len(row_ids)], labels[row, : len(row_ids)] = torch.tensor(row_ids), torch.tensor(row_labels)
            mask[row, : len(row_ids)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def for_generation(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> `input_ids`, `attention_mask` (B, T), padded on the left, so that all end where the answer
        begins."""
        rows = [self._ids(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.padding_id)
        mask = torch.zeros_like(ids)
        for row, row_ids in enumerate(rows):
            ids[row, longest - len(row_ids) :], mask[row, longest - len(row_ids) :] = torch.tensor(row_ids), 1
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, ids: Tensor) -> list[str]:
        """Generated ids (B, T) -> texts up to the end of the turn."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def answer_ids(self) -> tuple[int, int]:
        """Token ids of "yes" and "no" at the start of an answer."""
        return self._ids("yes")[0], self._ids("no")[0]

    # Files

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the tokenizer and `processor_config.json`."""
        self.tokenizer.save_pretrained(folder)
        names = list(signature(Processor).parameters)[1:]
        write_json(Path(folder) / "processor_config.json", {name: getattr(self, name) for name in names})

    @classmethod
    def from_pretrained(cls, folder: Path | str, **hub) -> Processor:
        """Load what `save_pretrained` wrote; `hub` as in LightMedVLM.from_pretrained. Raises UserError where it is
        not there."""
        folder = checkpoint_folder(folder, ("processor_config.json",), **hub)
        options = json.loads((folder / "processor_config.json").read_text())
        return cls(AutoTokenizer.from_pretrained(str(folder)), **options)

    @property
    def frame(self) -> tuple[int, int]:
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    def _image(self, num_views: int) -> str:
        """The image placeholders of a prompt."""
        images = min(num_views, self.max_views) if self.views == "side_by_side" else 1
        return IMAGE_TOKEN * (self.num_image_tokens * images)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _cut_target(self, text: str) -> list[int]:
        ids, room = self._tokenize(text), self.max_report_tokens - 1
        if len(ids) > room:
            fits = str(self.tokenizer.decode(ids[:room]))  # of one row of ids: one text, not a list of them
            end = max(fits.rfind(". "), fits.rfind(".\n"))
            ids = (self._tokenize(fits[: end + 1]) if end >= 0 else ids)[:room]
        return [*ids, self.end_id]

    @staticmethod
    def _plain(text: str) -> str:
        """Text from outside must not smuggle in chat or image tokens."""
        return text.replace("<|", "< |")


AutoProcessor.register(LightMedVLMConfig, Processor)
