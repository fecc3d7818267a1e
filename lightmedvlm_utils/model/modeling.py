"""LightMedVLM: Swin encoder, connector and Qwen3 in one model.

Letters: B batch, V views of a study, N image tokens, C vision width, Q connector tokens, T text tokens,
D language-model width, M supervised tokens of a batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoConfig, AutoModel, PreTrainedModel, Qwen3ForCausalLM
from transformers.utils import ModelOutput

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.configuration import LightMedVLMConfig
from lightmedvlm_utils.model.connectors import build_connector

PARTS = ("vision_encoder", "connector", "language_model")
WEIGHTS = "model.safetensors"


@dataclass
class LightMedVLMOutput(ModelOutput):
    """`loss` is the text loss plus `disease_weight` times the disease loss; the parts stand beside it."""

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    disease_loss: Tensor | None = None
    logits: Tensor | None = None


class LightMedVLM(PreTrainedModel):
    """A chest X-ray and a prompt in, text out."""

    config_class = LightMedVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: LightMedVLMConfig):
        super().__init__(config)
        self.vision_encoder = timm.create_model(
            config.vision["architecture"], pretrained=False, num_classes=0, **config.vision.get("arguments", {})
        )
        reduction = self.vision_encoder.feature_info[-1]["reduction"]
        self.grid = tuple(side // reduction for side in self.vision_encoder.patch_embed.img_size)
        self.connector = build_connector(
            vision_dim=self.vision_encoder.num_features,
            llm_dim=config.text.hidden_size,
            grid=self.grid,
            **config.connector,
        )
        self.language_model = Qwen3ForCausalLM(config.text)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        view_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        disease_targets: Tensor | None = None,
        disease_weight: float = 0.0,
    ) -> LightMedVLMOutput:
        """Loss of `labels` (B, T; -100 where nothing is learned), or without them the next token's logits (B, V).

        The image comes as `pixel_values` (B, V, 3, H, W) with `view_mask` (B, V), or as `image_features`
        (B, N, C) from `encode_images`. `disease_targets` (B, 14) in 0 to 1, NaN where unknown.
        """
        if image_features is None:
            image_features = self.encode_images(pixel_values, view_mask)  # (B, N, C)
        image_tokens = self.connector(image_features)  # (B, Q, D)
        embeddings = self.embed(input_ids, image_tokens)  # (B, T, D)
        hidden = self.language_model.model(
            inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # (B, T, D)
        if labels is None:
            return LightMedVLMOutput(logits=self.language_model.lm_head(hidden[:, -1]))  # (B, vocabulary)
        targets = labels[:, 1:]  # position t predicts token t + 1: the shift happens here and nowhere else
        supervised = targets != -100
        logits = self.language_model.lm_head(hidden[:, :-1][supervised])  # (M, vocabulary)
        text_loss = cross_entropy(logits.float(), targets[supervised])
        disease_loss = self.disease_loss(image_tokens, disease_targets) if disease_weight else None
        loss = text_loss if disease_loss is None else text_loss + disease_weight * disease_loss
        return LightMedVLMOutput(loss=loss, text_loss=text_loss, disease_loss=disease_loss)

    def encode_images(self, pixel_values: Tensor, view_mask: Tensor | None = None) -> Tensor:
        """(B, V, 3, H, W) -> (B, N, C): the encoder's tokens, averaged over a study's views position by position.

        `view_mask` (B, V) is True where a view exists; None means all do.
        """
        views = pixel_values.shape[1]
        if view_mask is None:
            view_mask = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=pixel_values.device)
        tokens = self.vision_encoder.forward_features(pixel_values[view_mask]).flatten(1, 2)  # (views, N, C)
        if views == 1:
            return tokens
        summed = tokens.new_zeros(len(pixel_values), *tokens.shape[1:])  # (B, N, C)
        summed.index_add_(0, view_mask.nonzero()[:, 0], tokens)
        return summed / view_mask.sum(1)[:, None, None]

    def embed(self, input_ids: Tensor, image_tokens: Tensor) -> Tensor:
        """Token embeddings (B, T, D) with the connector's tokens in place of the image placeholders."""
        embeddings = self.language_model.get_input_embeddings()(input_ids)  # (B, T, D)
        places = input_ids == self.config.image_token_id
        if not (places.sum(1) == image_tokens.shape[1]).all():
            raise ValueError(
                f"Every prompt needs {image_tokens.shape[1]} image placeholders, the connector's number of tokens; "
                f"got {sorted(set(places.sum(1).tolist()))}."
            )
        return embeddings.masked_scatter(places[..., None], image_tokens.to(embeddings.dtype))

    def disease_loss(self, image_tokens: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of the 14 disease queries, mean over the known targets."""
        known = ~targets.isnan()
        logits = self.connector.disease_logits(image_tokens)
        return binary_cross_entropy_with_logits(logits[known].float(), targets[known])

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        view_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **options,
    ) -> Tensor:
        """New token ids (B, up to max_new_tokens) for left-padded prompts; `options` go to transformers'
        `generate` (num_beams, max_new_tokens, do_sample, ...)."""
        if image_features is None:
            image_features = self.encode_images(pixel_values, view_mask)
        embeddings = self.embed(input_ids, self.connector(image_features))
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **options)

    def train_only(self, *parts: str) -> None:
        """Let the named parts learn and freeze the rest; of a language model with LoRA only the adapters learn."""
        for part in PARTS:
            has_lora = part == "language_model" and lora.has_lora(self.language_model)
            for name, parameter in getattr(self, part).named_parameters():
                parameter.requires_grad = part in parts and (not has_lora or lora.is_lora(name))

    def save_pretrained(self, folder: Path | str, **_) -> None:
        """Write `config.json`, `model.safetensors` (without LoRA) and, where there is LoRA, `adapter/`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        save_file(_base_weights(self), folder / WEIGHTS, metadata={"format": "pt"})
        if lora.has_lora(self.language_model):
            lora.save(self.language_model, folder / "adapter")

    @classmethod
    def from_pretrained(cls, folder: Path | str, **_) -> LightMedVLM:
        """Load a checkpoint folder strictly: any weight that is missing, left over or of another shape is an error."""
        folder = Path(folder)
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is not a LightMedVLM checkpoint: it has no {name}; name a folder that has.")
        model = cls(LightMedVLMConfig(**json.loads((folder / "config.json").read_text())))
        load_strictly(model, load_file(folder / WEIGHTS), folder / WEIGHTS)
        if (folder / "adapter").is_dir():
            lora.load(model.language_model, folder / "adapter")
        return model.eval()


def load_strictly(model: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Load `weights` into `model`; raises UserError unless every weight finds its place and every place its weight.

    A tied output head is the one place that may stay empty: it shares the input embedding's memory.
    """
    # Compared here and not by load_state_dict, which forgives a missing BatchNorm counter.
    own = {name for name in model.state_dict() if not name.endswith("lm_head.weight")}
    missing, unexpected = sorted(own - set(weights)), sorted(set(weights) - set(model.state_dict()))
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
        weights.pop("language_model.lm_head.weight")
    return weights


AutoConfig.register(LightMedVLMConfig.model_type, LightMedVLMConfig)
AutoModel.register(LightMedVLMConfig, LightMedVLM)
