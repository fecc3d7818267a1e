"""Where the encoder and the language model come from: the small shipped ones, the hub, a cache or a folder."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from lightmedvlm_utils.config import LABELS, Profile
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model.configuration import LightMedVLMConfig
from lightmedvlm_utils.model.modeling import LightMedVLM, load_strictly
from lightmedvlm_utils.model.processing import Processor
from lightmedvlm_utils.runs import seed_everything

SHIPPED = Path(__file__).resolve().parents[1] / "backbones"
SMALL_VISION, SMALL_LANGUAGE_MODEL = SHIPPED / "swin", SHIPPED / "qwen3"


def from_backbones(profile: Profile, connector: str = "sasa", seed: int = 0) -> tuple[LightMedVLM, Processor]:
    """A new model of the profile's two backbones with a fresh connector, and its processor.

    SASA's disease queries start from the labels' names in the language model's own embeddings. Raises UserError
    that says what to download where when weights are neither shipped, cached nor in a folder.
    """
    seed_everything(seed)
    encoder, vision = load_vision(profile.vision, profile.image_size, profile.random_init)
    language_model, tokenizer = load_language_model(profile.language_model, profile.random_init)
    options = {"name": connector, "output_scale": 1.0}
    if profile.match_output_scale:
        options["output_scale"] = language_model.get_input_embeddings().weight.std().item()
    if connector == "sasa":
        options |= {"num_queries": profile.num_queries, **profile.connector_options}
    config = LightMedVLMConfig(
        vision={name: vision[name] for name in ("architecture", "arguments")},
        text=language_model.config.to_dict(),
        connector=options,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    model = LightMedVLM(config)
    model.vision_encoder, model.language_model = encoder, language_model
    if connector == "sasa":
        model.connector.start_from_diseases(disease_embeddings(language_model, tokenizer))
    processor = Processor(
        tokenizer,
        image_size=profile.image_size,
        mean=vision["mean"],
        std=vision["std"],
        num_image_tokens=model.connector.num_output_tokens,
        max_views=profile.max_views,
        max_report_tokens=profile.max_report_tokens,
    )
    return model.eval(), processor


def disease_embeddings(language_model: nn.Module, tokenizer) -> torch.Tensor:
    """(14, D): each label's name tokenized without special tokens, its input embeddings averaged (thesis)."""
    table = language_model.get_input_embeddings().weight.detach()
    ids = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in LABELS]
    return torch.stack([table[torch.tensor(label_ids)].mean(0) for label_ids in ids])


def load_vision(name: str, image_size: int, random_init: bool = False) -> tuple[nn.Module, dict]:
    """A timm Swin without its classifier, and `{architecture, arguments, mean, std}`.

    `name` is `"small"`, a timm model name, or a folder with `config.json` and `model.safetensors`.
    """
    folder = SMALL_VISION if name == "small" else Path(name)
    if name == "small" or folder.is_dir():
        _require_files(folder, ("config.json", "model.safetensors"))
        vision = json.loads((folder / "config.json").read_text())
        encoder = timm.create_model(vision["architecture"], pretrained=False, num_classes=0, **vision["arguments"])
        if not random_init:
            load_strictly(encoder, _as_float32(load_file(folder / "model.safetensors")), folder)
        return encoder, vision
    if name not in timm.list_pretrained("swin_*"):
        raise UserError(f"{name!r} is neither a Swin of timm nor a folder; see timm.list_pretrained('swin_*').")
    try:
        encoder = timm.create_model(name, pretrained=not random_init, num_classes=0, img_size=image_size)
    except Exception as error:  # the hub client raises many kinds
        raise _no_weights(f"timm/{name}", "vision", error) from error
    data = timm.data.resolve_data_config(model=encoder)
    arguments = {"img_size": image_size}
    return encoder, {"architecture": name, "arguments": arguments, "mean": data["mean"], "std": data["std"]}


def load_language_model(name: str, random_init: bool = False) -> tuple[Qwen3ForCausalLM, object]:
    """A Qwen3 and its tokenizer. `name` is `"small"`, a hub name or a folder."""
    logging.disable_progress_bar()  # a bar per weight file is noise in a notebook
    source = SMALL_LANGUAGE_MODEL if name == "small" else name
    if name == "small":
        _require_files(SMALL_LANGUAGE_MODEL, ("config.json", "model.safetensors", "tokenizer.json"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if random_init:
            return Qwen3ForCausalLM(Qwen3Config.from_pretrained(source)), tokenizer
        return Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32), tokenizer
    except (OSError, ValueError) as error:
        raise _no_weights(name, "language_model", error) from error


def _require_files(folder: Path, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}; `make backbones` makes the small backbones anew.")


def _no_weights(name: str, what: str, error: Exception) -> UserError:
    return UserError(
        f"The weights of {name} are neither cached nor a local folder and could not be downloaded "
        f"({type(error).__name__}): connect once, or download them from huggingface.co/{name} and give the folder "
        f"as the profile's `{what}`."
    )


def _as_float32(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The shipped weights are stored in half precision to stay small."""
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
