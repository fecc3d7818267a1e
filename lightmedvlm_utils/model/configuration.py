"""What a LightMedVLM checkpoint's `config.json` says: enough to rebuild the model without any download."""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig, Qwen3Config


class LightMedVLMConfig(PretrainedConfig):
    """Configuration of the three parts.

    `vision`: `{"architecture": timm name, "arguments": {...}}`, built without weights.
    `text`: the fields of a Qwen3Config. `connector`: `{"name": "sasa" | "mlp", **options}`.
    `image_token_id`: the placeholder that connector tokens replace.
    """

    model_type = "lightmedvlm"
    sub_configs: ClassVar = {"text": Qwen3Config}

    def __init__(
        self,
        vision: dict | None = None,
        text: Qwen3Config | dict | None = None,
        connector: dict | None = None,
        image_token_id: int = 151655,
        **kwargs,
    ):
        self.vision = vision or {}
        self.text = Qwen3Config(**text) if isinstance(text, dict) else text or Qwen3Config()
        self.connector = connector or {"name": "sasa"}
        self.image_token_id = image_token_id
        super().__init__(**kwargs)
