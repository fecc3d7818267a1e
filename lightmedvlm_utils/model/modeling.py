"""LightMedVLM: Swin encoder, connector and Qwen3 in one model.

Letters: B batch, V views of a study, N image tokens, C vision width, Q connector tokens, T text tokens,
D language-model width, W words that describe a finding, M supervised tokens of a batch. I is the number of images that
the connector sees: B where views are averaged, all views of the batch where they stand side by side.

"Features" are what the connector reads of the encoder: its tokens (I, N, C), or the outputs (I, H, W, C) of several
stages, fine to coarse.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    Qwen3ForCausalLM,
)
from transformers.utils import ModelOutput

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.configuration import LightMedVLMConfig, checkpoint_folder
from lightmedvlm_utils.model.connectors import build_connector
from lightmedvlm_utils.model.connectors.base import Features, Known

T = TypeVar("T")
PARTS = ("vision_encoder", "connector", "language_model")
WEIGHTS = "model.safetensors"
TIED = {"language_model.lm_head.weight"}  # shares the input embedding's memory where the language model ties them

# Options of transformers' save_pretrained that ask for what is done here anyway.
_PLAIN_SAVE = {"safe_serialization": (True,), "is_main_process": (True,), "push_to_hub": (False,)}


@dataclass
class LightMedVLMOutput(ModelOutput):
    """`loss` is the text loss plus `disease_weight` times the disease loss; the parts stand beside it."""

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    disease_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LightMedVLM(PreTrainedModel, GenerationMixin):
    """A chest X-ray and a prompt in, text out.

    The three parts are built with random weights from the configuration, unless an encoder or a language model of
    that configuration is given. Architecture: Vu et al., *LightMedVLM*, thesis, FPT University 2025.
    """

    config_class = LightMedVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    vision_encoder: Any  # a Swin of timm; torch's types take each of its parts for a tensor or a module

    if TYPE_CHECKING:
        # The types cannot see through transformers' decorator of the method.
        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]

    def __init__(
        self,
        config: LightMedVLMConfig,
        vision_encoder: nn.Module | None = None,
        language_model: Qwen3ForCausalLM | None = None,
    ):
        super().__init__(config)
        self.vision_encoder = vision_encoder or build_encoder(config.vision)
        self.grid = feature_grid(self.vision_encoder)
        self.connector = build_connector(
            vision_dim=self.vision_encoder.num_features,
            llm_dim=config.text.hidden_size,
            grid=self.grid,
            **config.connector,
        )
        stages = len(self.vision_encoder.feature_info)
        if self.connector.num_stages > stages:
            raise UserError(
                f"The connector reads {self.connector.num_stages} stages, but {config.vision.get('architecture')} has "
                f"{stages}; ask for fewer."
            )
        self.language_model = language_model or Qwen3ForCausalLM(config.text)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every part has initialised itself, or brought its weights along."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        view_mask: Tensor | None = None,
        image_features: Features | None = None,
        image_embeds: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        known: Known | None = None,
        told: Tensor | None = None,
        disease_weight: float = 0.0,
        logits_to_keep: int = 1,
        **options,
    ) -> LightMedVLMOutput:
        """Loss of `labels` (B, T; -100 where nothing is learned), or without them the logits (B, K, vocabulary) of
        the last K = `logits_to_keep` positions (0 for all).

        The image comes as `pixel_values` (B, V, 3, H, W) with `view_mask` (B, V), as `image_features` from
        `encode_images`, or as `image_embeds` (I, Q, D) from `image_tokens`; the prompt as `input_ids` (B, T) or
        `inputs_embeds` (B, T, D) from `embed`. `known` is what the disease loss compares with, and what a connector
        with a detector puts in the place of what it sees, where `told` (B,) is true.
        """
        if image_features is None and pixel_values is not None:
            image_features = self.encode_images(pixel_values, view_mask)
        if image_features is not None:
            image_embeds = self.image_tokens(None, view_mask, image_features, _told(known, told))
        if inputs_embeds is None:
            inputs_embeds = self.embed(_given(input_ids, "input_ids"), image_embeds)  # (B, T, D)
        output = self.language_model.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **options,
        )
        hidden = output.last_hidden_state  # (B, T, D)
        if labels is None:
            logits = self.language_model.lm_head(hidden[:, -logits_to_keep:])  # (B, K, vocabulary)
            cache, layers, attentions = output.past_key_values, output.hidden_states, output.attentions
            return LightMedVLMOutput(logits=logits, past_key_values=cache, hidden_states=layers, attentions=attentions)
        targets = labels[:, 1:]  # position t predicts token t + 1: the shift happens here and nowhere else
        supervised = targets != -100
        logits = self.language_model.lm_head(hidden[:, :-1][supervised])  # (M, vocabulary)
        text_loss = cross_entropy(logits.float(), targets[supervised])
        if not disease_weight:
            return LightMedVLMOutput(loss=text_loss, text_loss=text_loss)
        if image_features is None:
            raise ValueError("The disease loss needs an image; give it.")
        disease_loss = self.disease_loss(image_features, _given(known, "known"), view_mask)
        loss = text_loss + disease_weight * disease_loss
        return LightMedVLMOutput(loss=loss, text_loss=text_loss, disease_loss=disease_loss)

    # From images to the language model's tokens

    def encode_images(self, pixel_values: Tensor, view_mask: Tensor | None = None) -> Features:
        """(B, V, 3, H, W) -> features of I images. Where the configuration averages views, I = B, the mean over a
        study's views position by position; else I counts the views, study by study.

        `view_mask` (B, V) is True where a view exists; None means all do.
        """
        stages = self.encoded_stages(pixel_values, view_mask)
        return stages if self.connector.num_stages else stages[-1].flatten(1, 2)

    def encoded_stages(self, pixel_values: Tensor, view_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """As `encode_images`, always as stages (I, H, W, C), also where the connector reads one alone."""
        if view_mask is None:
            view_mask = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=pixel_values.device)
        stages = encoder_stages(self.vision_encoder, pixel_values[view_mask], max(1, self.connector.num_stages))
        if self.config.views == "side_by_side" or pixel_values.shape[1] == 1:
            return stages
        return tuple(study_mean(stage, view_mask) for stage in stages)

    def image_tokens(
        self,
        pixel_values: Tensor | None = None,
        view_mask: Tensor | None = None,
        image_features: Features | None = None,
        known: Known | None = None,
    ) -> Tensor | None:
        """What the language model sees of the images, (I, Q, D); None without images. What is `known` of B studies a
        connector with a detector says without looking; the others have no use for it."""
        if image_features is None:
            if pixel_values is None:
                return None
            image_features = self.encode_images(pixel_values, view_mask)
        features = self._readable(image_features)
        if self.connector.detector is None:
            return self.connector(features)
        return self.connector(features, known and self._per_image(known, features, view_mask))

    def _readable(self, features: Features) -> Features:
        """Of the stages that are there, those that the connector reads; raises ValueError where some are missing."""
        wanted = self.connector.num_stages
        found = features if isinstance(features, tuple) else (features,)
        if len(found) < wanted:
            raise ValueError(f"The connector reads {wanted} stages of the encoder; the features have {len(found)}.")
        if wanted:
            return found[-wanted:]
        return found[-1].flatten(1, -2)  # (I, H, W, C) or (I, N, C) -> (I, N, C)

    @staticmethod
    def _per_image(known: Known, features: Features, view_mask: Tensor | None) -> Known:
        """What is known of B studies -> of I images: every view of a study shows its study's findings."""
        images = len(features[0] if isinstance(features, tuple) else features)
        if images == len(known.states):
            return known
        counts = _given(view_mask, "view_mask").sum(1)
        masks = None if known.masks is None else known.masks.repeat_interleave(counts, 0)
        return Known(known.states.repeat_interleave(counts, 0), known.words.repeat_interleave(counts, 0), masks)

    def embed(self, input_ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Token embeddings (B, T, D) with the connector's tokens (I, Q, D) in place of the image placeholders.

        Raises ValueError where the prompts have more or fewer placeholders than there are tokens.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids)  # (B, T, D)
        if image_tokens is None:
            return embeddings
        images, queries = image_tokens.shape[:2]
        places = input_ids == self.config.image_token_id
        found = places.sum(1)
        fits = (found == queries).all() if images == len(input_ids) else (found % queries == 0).all()
        if not fits or found.sum() != images * queries:
            raise ValueError(
                f"Every prompt needs {queries} image placeholders for each of its images, the connector's number of "
                f"tokens; got {found.tolist()} for {images} images."
            )
        return embeddings.masked_scatter(places[..., None], image_tokens.to(embeddings.dtype))

    # Text out

    @torch.no_grad()
    def generate(  # type: ignore[override]  # by name, and of this model's own inputs
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        view_mask: Tensor | None = None,
        image_features: Features | None = None,
        image_embeds: Tensor | None = None,
        **options,
    ) -> Tensor:
        """Prompts (B, T), padded on the left, and what the model says after them: ids (B, T + new tokens).

        `options` are those of transformers' `generate` (attention_mask, num_beams, max_new_tokens, do_sample,
        cache_implementation, ...). The images are encoded once, also for many beams; they come as for `forward`.
        """
        if image_embeds is None:
            image_embeds = self.image_tokens(pixel_values, view_mask, image_features)
        embeddings = self.embed(_given(input_ids, "input_ids"), image_embeds)
        return super().generate(input_ids=input_ids, inputs_embeds=embeddings, **options)  # type: ignore[misc,return-value]

    # What the connector knows by itself

    @property
    def query_names(self) -> list[str]:
        """What each connector token is called: by its label where it stands for one."""
        labels = self.connector.token_labels
        return [*labels, *(f"query {i}" for i in range(len(labels), self.connector.num_output_tokens))]

    def attention_maps(
        self,
        pixel_values: Tensor | None = None,
        view_mask: Tensor | None = None,
        image_features: Features | None = None,
    ) -> Tensor:
        """(I, Q, H, W): where each of `query_names` looks; each map sums to 1. UserError for a connector without."""
        if image_features is None:
            image_features = self.encode_images(_given(pixel_values, "an image"), view_mask)
        return self.connector.attention_maps(self._readable(image_features))

    def disease_logits(self, image_features: Features, view_mask: Tensor | None = None) -> Tensor:
        """Features of I images -> (B, 14): the logit of each label, mean over views that stand side by side."""
        logits = self.connector.disease_logits(self._readable(image_features))  # (I, 14)
        if self.config.views == "side_by_side" and view_mask is not None:
            return study_mean(logits, view_mask)
        return logits

    def disease_loss(self, image_features: Features, known: Known, view_mask: Tensor | None = None) -> Tensor:
        """The connector's disease loss on what is known of B studies."""
        features = self._readable(image_features)
        return self.connector.disease_loss(features, self._per_image(known, features, view_mask))

    # What learns, and what it costs

    def train_only(self, *parts: str) -> None:
        """Let the named parts learn and freeze the rest: of PARTS, and "connector.detector", which does not learn with
        the rest of its connector. Of a language model with LoRA only the adapters learn."""
        for part in PARTS:
            has_lora = part == "language_model" and lora.has_lora(self.language_model)
            for name, parameter in getattr(self, part).named_parameters():
                parameter.requires_grad = part in parts and (not has_lora or lora.is_lora(name))
        if self.connector.detector is not None:
            self.connector.detector.requires_grad_("connector.detector" in parts)

    def _set_gradient_checkpointing(self, enable: bool = True, *arguments: Any, **options: Any) -> None:
        super()._set_gradient_checkpointing(enable, *arguments, **options)
        self.vision_encoder.set_grad_checkpointing(enable)  # timm's models have their own switch

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    # Files

    def save_pretrained(  # type: ignore[override]  # the other options are refused
        self, folder: Path | str, state_dict: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Write `config.json`, `model.safetensors` (without LoRA) and, where there is LoRA, `adapter/` as peft does.

        For a checkpoint without an adapter call `merge_lora` first. `state_dict` is what transformers' Trainer hands
        over: the model's own, which is read here anyway. Raises UserError for any other option but a plain save's.
        """
        unknown = sorted(name for name, value in options.items() if value not in _PLAIN_SAVE.get(name, ()))
        if unknown:
            raise UserError(f"A checkpoint cannot be saved with {unknown[0]}={options[unknown[0]]!r}; leave it out.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        save_file(_base_weights(self), folder / WEIGHTS, metadata={"format": "pt"})
        if lora.has_lora(self.language_model):
            lora.save(self.language_model, folder / "adapter")

    @classmethod
    def from_pretrained(  # type: ignore[override]  # strict: no option to load anything else
        cls,
        folder: Path | str,
        *_,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        config: LightMedVLMConfig | None = None,
        **hub,
    ) -> LightMedVLM:
        """Load a checkpoint folder or hub repository strictly: any weight that is missing, left over or of another
        shape raises UserError. `dtype` converts the weights; `hub` are options of `checkpoint_folder`.

        Only safetensors are read and only this package's code runs, whatever `trust_remote_code` says.
        """
        folder = checkpoint_folder(folder, ("config.json", WEIGHTS), **hub)
        model = cls(config or LightMedVLMConfig(**json.loads((folder / "config.json").read_text())))
        tied = TIED if model.config.text.tie_word_embeddings else set()
        load_strictly(model, load_file(folder / WEIGHTS), folder / WEIGHTS, optional=tied)
        if (folder / "adapter").is_dir():
            lora.load(model.language_model, folder / "adapter")
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        if attn_implementation:
            model.set_attn_implementation(attn_implementation)
        return model.to(dtype=dtype).eval()

    def merge_lora(self) -> LightMedVLM:
        """Add the adapters to the weights they stand beside, and drop them: for export, and for speed."""
        lora.merge(self.language_model)
        return self


def build_encoder(vision: dict) -> nn.Module:
    """A timm Swin without its classifier and without weights, from a configuration's `vision`."""
    return timm.create_model(vision["architecture"], pretrained=False, num_classes=0, **vision.get("arguments", {}))


def encoder_stages(encoder: Any, pixels: Tensor, count: int) -> tuple[Tensor, ...]:
    """(I, 3, S, S) -> the outputs (I, H, W, C) of the last `count` stages of a Swin, fine to coarse, the very last one
    normalized, as it leaves the encoder."""
    maps = encoder.forward_intermediates(pixels, indices=count, norm=True, intermediates_only=True)  # (I, C, H, W)
    return tuple(stage.permute(0, 2, 3, 1) for stage in maps)


def feature_grid(encoder: Any) -> tuple[int, int]:
    """(H, W) of the token grid an encoder ends with; where a side is odd, Swin pads it before it halves it."""
    halvings = encoder.feature_info[-1]["reduction"] // encoder.patch_embed.patch_size[0]
    height, width = (-(-side // halvings) for side in encoder.patch_embed.grid_size)
    return height, width


def _given(value: T | None, name: str) -> T:
    """An input that only some uses need; raises ValueError where one of them lacks it."""
    if value is None:
        raise ValueError(f"The model needs {name} for that; give it.")
    return value


def _told(known: Known | None, told: Tensor | None) -> Known | None:
    """Of what is known, that of the studies that are `told` (B,); the rest as unknown."""
    if known is None or told is None:
        return None
    return known._replace(states=torch.where(told[:, None], known.states, torch.nan))


def study_mean(rows: Tensor, view_mask: Tensor) -> Tensor:
    """Rows (views, ...) -> (B, ...): the mean over each study's views; `view_mask` (B, V) says whose they are."""
    summed = rows.new_zeros(len(view_mask), *rows.shape[1:])
    summed.index_add_(0, view_mask.nonzero()[:, 0], rows)
    return summed / view_mask.sum(1).view(-1, *[1] * (rows.ndim - 1))


def load_strictly(
    model: nn.Module, weights: dict[str, Tensor], source: Path | str, optional: Set[str] = frozenset()
) -> None:
    """Load `weights` into `model`; raises UserError unless every weight finds its place and every place its weight.

    The names in `optional` may stay away.
    """
    # Compared here and not by load_state_dict, which forgives a missing BatchNorm counter.
    own = set(model.state_dict())
    missing, unexpected = sorted(own - set(weights) - optional), sorted(set(weights) - own)
    if missing or unexpected:
        raise UserError(
            f"{source} does not fit its config.json: missing {missing[:3] or 'none'}, left over "
            f"{unexpected[:3] or 'none'}; load the folder that this file was saved in."
        )
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{source} does not fit its config.json ({str(error).splitlines()[-1].strip()}).") from error


def _base_weights(model: LightMedVLM) -> dict[str, Tensor]:
    """The state dict as it was before LoRA wrapped the language model, without the tied output head."""
    weights = {
        name.replace(".base_layer.", "."): value.contiguous()
        for name, value in model.state_dict().items()
        if not lora.is_lora(name)
    }
    if model.config.text.tie_word_embeddings:
        weights = {name: value for name, value in weights.items() if name not in TIED}
    return weights


AutoModel.register(LightMedVLMConfig, LightMedVLM)
AutoModelForImageTextToText.register(LightMedVLMConfig, LightMedVLM)
