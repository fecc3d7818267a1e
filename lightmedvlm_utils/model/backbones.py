"""Where the encoder and the language model come from: the small shipped ones, the hub, a cache or a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from lightmedvlm_utils.config import Profile
from lightmedvlm_utils.data.descriptions import WORDS
from lightmedvlm_utils.device import seed_everything
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import BACKBONES, SHIPPED_BACKBONES
from lightmedvlm_utils.model.configuration import LightMedVLMConfig
from lightmedvlm_utils.model.connectors import STATES, options_of, profile_options
from lightmedvlm_utils.model.connectors.base import Words
from lightmedvlm_utils.model.modeling import LightMedVLM, build_encoder, load_strictly
from lightmedvlm_utils.model.processing import IMAGE_TOKEN, Processor, token_id
from lightmedvlm_utils.observations import LABELS

SMALL_LANGUAGE_MODEL = SHIPPED_BACKBONES["language_model"]["small"]
CONFIGURATIONS = {"Qwen/Qwen3-0.6B": BACKBONES / "qwen3-0.6b"}  # shipped without weights; timm knows its Swins itself


def from_backbones(
    vision: str = "small",
    llm: str = "small",
    connector: str = "sasa",
    *,
    image_size: int | tuple[int, int] | None = None,
    random_init: bool = False,
    tokenizer: str | None = None,
    connector_options: dict | None = None,
    match_output_scale: bool = False,
    views: str = "mean",
    max_views: int = 1,
    max_report_tokens: int = 100,
    seed: int = 0,
) -> tuple[LightMedVLM, Processor]:
    """A new model of two backbones with a fresh connector, and its processor.

    `vision` is `"small"` or `"small-masked"` (shipped), a Swin of timm or a folder; `llm` is `"small"`, a Qwen3 of the
    hub or a folder.
    With `random_init` both are built at their size without weights and without a download. `tokenizer` is the
    language model's own unless another one is named; at random it need not know words, and the small one stands in
    for one that is not there. `image_size` in pixels is the encoder's own unless given. `connector_options` are
    keyword arguments of the connector; `match_output_scale` makes its tokens as large as the words for a finding
    (`state_words`). `views` and the maxima as in LightMedVLMConfig and Processor. A connector with disease queries
    starts them from the labels' names in the language model's own embeddings.

    Raises UserError that says what to download where when weights are neither shipped, cached nor in a folder.
    """
    seed_everything(seed)
    encoder, eye = load_vision(vision, image_size, random_init)
    language_model, words = load_language_model(llm, random_init, tokenizer)
    options = {"name": connector, **(connector_options or {})}
    states = state_words(language_model, words)
    if match_output_scale and "output_scale" in options_of(connector):
        options["output_scale"] = states.square().mean().sqrt().item()
    limits = {"max_views": max_views, "max_report_tokens": max_report_tokens}
    model, processor = assemble(encoder, eye, language_model, words, options, views=views, **limits)
    model.connector.start_from_words(connector_words(language_model, words))
    return model, processor


def assemble(
    encoder: nn.Module,
    eye: dict,
    language_model: Qwen3ForCausalLM,
    words: PreTrainedTokenizerBase,
    connector: dict,
    views: str = "mean",
    **processing,
) -> tuple[LightMedVLM, Processor]:
    """The model of what `load_vision` and `load_language_model` return with a new connector, and its processor;
    `processing` are further options of Processor."""
    config = LightMedVLMConfig(
        vision={name: eye[name] for name in ("architecture", "arguments")},
        text=language_model.config.to_dict(),
        connector=connector,
        image_token_id=token_id(words, IMAGE_TOKEN),
        views=views,
    )
    model = LightMedVLM(config, encoder, language_model)
    processor = Processor(
        words,
        image_size=eye["arguments"]["img_size"],
        mean=eye["mean"],
        std=eye["std"],
        num_image_tokens=model.connector.num_output_tokens,
        interpolation=eye.get("interpolation", "bilinear"),
        views=views,
        **processing,
    )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = processor.end_id, processor.padding_id
    return model.eval(), processor


def from_profile(profile: Profile, connector: str = "sasa", seed: int = 0) -> tuple[LightMedVLM, Processor]:
    """`from_backbones` with a profile's values."""
    options = profile_options(connector, profile)
    return from_backbones(
        profile.vision,
        profile.language_model,
        connector,
        image_size=profile.image_size,
        random_init=profile.random_init,
        connector_options=options,
        match_output_scale=profile.match_output_scale,
        max_views=profile.max_views,
        max_report_tokens=profile.max_report_tokens,
        seed=seed,
    )


def connector_words(language_model: PreTrainedModel, tokenizer) -> Words:
    """The language model's own words from which a connector starts."""
    described = [mean_embedding(language_model, tokenizer, f" {word}") for word in WORDS]
    names, states = disease_embeddings(language_model, tokenizer), state_words(language_model, tokenizer)
    return Words(names, states, torch.stack(described))


def disease_embeddings(language_model: PreTrainedModel, tokenizer) -> torch.Tensor:
    """(14, D): each label's name as the language model embeds it (thesis)."""
    return torch.stack([mean_embedding(language_model, tokenizer, label) for label in LABELS])


def state_words(language_model: PreTrainedModel, tokenizer) -> torch.Tensor:
    """(14, 3, D): each label in each of the states absent, possible, present, as " Edema present" is embedded."""
    words = [mean_embedding(language_model, tokenizer, f" {label} {state}") for label in LABELS for state in STATES]
    return torch.stack(words).unflatten(0, (len(LABELS), len(STATES)))


def mean_embedding(language_model: PreTrainedModel, tokenizer, text: str) -> torch.Tensor:
    """(D,): a text tokenized without special tokens, its input embeddings averaged."""
    table = language_model.get_input_embeddings().get_parameter("weight").detach()
    return table[torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])].mean(0)


def load_vision(
    name: str, image_size: int | tuple[int, int] | None = None, random_init: bool = False
) -> tuple[nn.Module, dict]:
    """A timm Swin without its classifier, and `{architecture, arguments, mean, std, interpolation}`.

    `name` is `"small"` or `"small-masked"`, a timm model name, or a folder with `config.json` and `model.safetensors`.
    A folder's image size is its own; UserError where another is asked for.
    """
    folder = SHIPPED_BACKBONES["vision"].get(name, Path(name))
    if name in SHIPPED_BACKBONES["vision"] or folder.is_dir():
        _require_files(folder, ("config.json", "model.safetensors"))
        vision = json.loads((folder / "config.json").read_text())
        size = vision["arguments"]["img_size"]
        if image_size not in (None, size):
            raise UserError(f"The encoder in {folder} takes images of {size} pixels, not {image_size}; give it those.")
        encoder = build_encoder(vision)
        if not random_init:
            load_strictly(encoder, _as_float32(load_file(folder / "model.safetensors")), folder)
        return encoder, vision
    is_swin = name.split(".")[0] in timm.list_models("swin*") and not name.startswith("swinv2_cr")
    try:
        pretrained = timm.get_pretrained_cfg(name) if is_swin else None
    except RuntimeError:  # a Swin with a tag that timm does not know
        pretrained = None
    if pretrained is None:
        raise UserError(
            f"{name!r} is neither a Swin of timm nor a folder; see timm.list_models(['swin_*', 'swinv2_*'])."
        )
    data = timm.data.resolve_data_config(pretrained_cfg=pretrained.to_dict())
    arguments: dict[str, Any] = {"img_size": image_size or data["input_size"][1]}
    try:
        encoder = timm.create_model(name, pretrained=not random_init, num_classes=0, **arguments)
    except Exception as error:  # the hub client raises many kinds
        raise _not_found("weights", f"timm/{name}", "encoder", error) from error
    return encoder, {
        "architecture": name,
        "arguments": arguments,
        **{key: data[key] for key in ("mean", "std", "interpolation")},
    }


def load_language_model(
    name: str, random_init: bool = False, tokenizer: str | None = None
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """A Qwen3 in float32 and its tokenizer. `name` is `"small"`, a hub name or a folder; `tokenizer` likewise."""
    logging.disable_progress_bar()  # a bar per weight file is noise in a notebook
    source: Path | str = SMALL_LANGUAGE_MODEL if name == "small" else name
    if name == "small":
        _require_files(SMALL_LANGUAGE_MODEL, ("config.json", "model.safetensors", "tokenizer.json"))
    elif random_init and name in CONFIGURATIONS:
        source, tokenizer = CONFIGURATIONS[name], tokenizer or "small"
    words = _load_tokenizer(SMALL_LANGUAGE_MODEL if tokenizer == "small" else tokenizer or source)
    try:
        if random_init:
            return Qwen3ForCausalLM(Qwen3Config.from_pretrained(source)), words
        return Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32), words
    except (OSError, ValueError) as error:
        raise _not_found("weights", name, "language model", error) from error


def _load_tokenizer(name: Path | str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _not_found("tokenizer", name, "tokenizer", error) from error


def _require_files(folder: Path, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}; `make backbones` makes the small backbones anew.")


def _not_found(what: str, name: Path | str, part: str, error: Exception) -> UserError:
    return UserError(
        f"The {what} of {name} could not be found in the cache or a local folder, nor downloaded "
        f"({type(error).__name__}): connect once, or download from huggingface.co/{name} and give the folder "
        f"as the {part}."
    )


def _as_float32(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The shipped weights are stored in half precision to stay small."""
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
