"""What a LightMedVLM checkpoint's `config.json` says: enough to rebuild the model without any download."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from transformers import AutoConfig, PretrainedConfig, Qwen3Config

from lightmedvlm_utils.errors import UserError

VIEWS = ("mean", "side_by_side")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
FROM_AUTO = ("trust_remote_code", "adapter_kwargs", "_from_auto")  # the Auto classes add them; none runs code here


class LightMedVLMConfig(PretrainedConfig):
    """Configuration of the three parts.

    `vision`: `{"architecture": timm name, "arguments": {...}}`, built without weights.
    `text`: the fields of a Qwen3Config. `connector`: `{"name": of a registered connector, **options}`.
    `image_token_id`: the placeholder that connector tokens replace.
    `views`: how the views of one study come together: `"mean"` of the encoder's tokens, position by position (thesis),
    or `"side_by_side"`, each view through the connector by itself and all their tokens in the prompt.
    """

    model_type = "lightmedvlm"
    sub_configs: ClassVar = {"text": Qwen3Config}

    def __init__(
        self,
        vision: dict | None = None,
        text: Qwen3Config | dict | None = None,
        connector: dict | None = None,
        image_token_id: int = 151655,
        views: str = "mean",
        **kwargs,
    ):
        if views not in VIEWS:
            raise UserError(f"A model cannot take its views as {views!r}; choose one of {', '.join(VIEWS)}.")
        self.vision = vision or {}
        self.text = Qwen3Config(**text) if isinstance(text, dict) else text or Qwen3Config()
        self.connector = connector or {"name": "sasa"}
        self.image_token_id = image_token_id
        self.views = views
        super().__init__(**kwargs)

    def get_text_config(self, *_, **__) -> Qwen3Config:
        """What transformers' generation asks for to build its caches and masks."""
        return self.text


def checkpoint_folder(name: Path | str, needed: tuple[str, ...], **hub) -> Path:
    """The folder of a checkpoint that holds the files `needed`: `name` itself, or a hub repository `owner/name`,
    downloaded or cached; `hub` are options of `huggingface_hub.snapshot_download`, those named in HUB_OPTIONS.

    Raises UserError where there is none. Only JSON and safetensors files are fetched: no code, no pickle.
    """
    hub = {option: value for option, value in hub.items() if option not in FROM_AUTO}
    unknown = sorted(set(hub) - set(HUB_OPTIONS))
    if unknown:
        raise UserError(f"A checkpoint cannot be loaded with {unknown[0]!r}; known are {', '.join(HUB_OPTIONS)}.")
    folder = Path(name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"], **hub))
        except Exception as error:  # the hub client raises many kinds
            raise UserError(
                f"{name} is not a LightMedVLM checkpoint here, nor could it be downloaded ({type(error).__name__}); "
                "name a folder that is one."
            ) from error
    for file in needed:
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not a LightMedVLM checkpoint: it has no {file}; name a folder that has.")
    return folder


AutoConfig.register(LightMedVLMConfig.model_type, LightMedVLMConfig)
