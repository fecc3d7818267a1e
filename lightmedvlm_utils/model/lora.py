"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the language model's attention projections, through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from lightmedvlm_utils.errors import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def add(language_model: nn.Module, rank: int = 8, alpha: int = 16, dropout: float = 0.1) -> int:
    """Put LoRA beside the attention projections, in place; returns the number of parameters it adds.

    The effect is zero at first, since B starts at zero.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(TARGETS))
    _inject(language_model, config)
    return sum(p.numel() for name, p in language_model.named_parameters() if is_lora(name))


def is_lora(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def has_lora(language_model: nn.Module) -> bool:
    return any(isinstance(module, LoraLayer) for module in language_model.modules())


def merge(language_model: nn.Module) -> None:
    """Add every adapter to the weights it stands beside, W + (alpha / r) B A, and take it out, in place."""
    for name, module in list(language_model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            language_model.set_submodule(name, module.get_base_layer())


def save(language_model: nn.Module, folder: Path) -> None:
    """Write the adapter as peft does, `adapter_config.json` and `adapter_model.safetensors`, so that
    `PeftModel.from_pretrained` can put it on the bare language model too."""
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = language_model.lora_config
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(language_model)
    save_file({PREFIX + name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)


def load(language_model: nn.Module, folder: Path) -> None:
    """Inject the saved adapter and load it; raises UserError where its weights do not fit exactly."""
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False  # or peft freezes the adapter, and the next stage could not go on training it
    _inject(language_model, config)
    saved, own = load_file(folder / WEIGHTS), dict(language_model.named_parameters())
    places = {_place(name): value for name, value in saved.items()}
    expected = {name for name in own if is_lora(name)}
    if set(places) != expected:
        raise UserError(f"{folder / WEIGHTS} does not fit this language model; load the folder it was saved in.")
    language_model.load_state_dict(places, strict=False)


def _inject(language_model: nn.Module, config: Any) -> None:
    """Put the adapters in and keep their configuration (Any: torch's types know no attribute but tensors, modules)."""
    inject_adapter_in_model(config, language_model)
    language_model.lora_config = config


def _place(name: str) -> str:
    """Name of a saved adapter weight inside the model: peft leaves the adapter's own name out of the file and puts
    its wrapper's before it."""
    name = name.removeprefix(PREFIX)
    return name.replace(".lora_A.weight", ".lora_A.default.weight").replace(".lora_B.weight", ".lora_B.default.weight")
