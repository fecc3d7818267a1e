"""Read the checkpoints of the thesis' own code (Lightning `.ckpt` files) into our model, key by key.

Vu et al., *LightMedVLM*, thesis, FPT University 2025. Its encoder carries the names of transformers 4's SwinModel;
ours is timm's Swin, which fuses query, key and value and counts a stage's downsampling to the stage after it.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.backbones import assemble, load_language_model, load_vision
from lightmedvlm_utils.model.connectors import options_of
from lightmedvlm_utils.model.modeling import TIED, LightMedVLM
from lightmedvlm_utils.model.processing import Processor

VISION, LANGUAGE_MODEL = "swin_base_patch4_window7_224.ms_in1k", "Qwen/Qwen3-0.6B"
PEFT = "base_model.model."
EMBEDDING = "language_model.model.embed_tokens.weight"

# Which code wrote a checkpoint, told by its connector's prefix: (what it is, prefix of its language model, connector).
LAYOUTS = {
    "llama_proj.": ("report", "llama_model.", {"name": "sasa", "residual": "raw"}),
    "llm_proj.": ("vqa", "model.", {"name": "sasa", "residual": "normed"}),
    "proj.": ("baseline", "model.", {"name": "mlp"}),
}
CONNECTOR = {
    "conv_block": "refine",
    "vis_proj": "project",
    "latents": "queries",
    "cross_attn": "attention",
    "ln_q": "norm_queries",
    "ln_v": "norm_keys",
    "ln_out": "norm_attended",
    "mlp": "mlp",
    "hidden_1": "hidden",
    "hidden_2": "project",
}
ENCODER = (
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.norm", "patch_embed.norm"),
    (r"layernorm", "norm"),
)
BLOCK = {
    "layernorm_before": "norm1",
    "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.self.relative_position_index": "attn.relative_position_index",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


# While a checkpoint is read, Lightning's dictionary of hyper-parameters is built as a plain one: it runs nothing.
_LIGHTNING: list[Callable | tuple[Callable, str]] = [
    (OrderedDict, f"{module}.AttributeDict")
    for module in (
        "lightning.fabric.utilities.data",
        "lightning_fabric.utilities.data",
        "lightning.pytorch.utilities.parsing",
        "pytorch_lightning.utilities.parsing",
    )
]


@dataclass
class Account:
    """What became of every key: `read` names in the checkpoint, each in exactly one of the lists that follow.

    `loaded` went into the model (three of them, query, key and value, into one weight); `second_names` of a weight
    that is loaded were equal to it; `recomputed` indices were equal to our own. `from_backbones` lists parts whose
    weights the checkpoint does not hold, `untouched` our weights that then still have their starting values.
    """

    stage: str
    loaded: list[str] = field(default_factory=list)
    second_names: list[str] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)
    from_backbones: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)

    @property
    def read(self) -> int:
        return len(self.loaded) + len(self.second_names) + len(self.recomputed)

    def __str__(self) -> str:
        text = (
            f"{self.stage} checkpoint: {self.read} keys read; {len(self.loaded)} loaded, {len(self.second_names)} "
            f"second names of loaded weights, {len(self.recomputed)} recomputed indices, none left over"
        )
        if self.from_backbones:
            text += f"; not in the checkpoint and taken from the backbones: {', '.join(self.from_backbones)}"
        if self.untouched:
            text += f"; not in the checkpoint and left at their start: {', '.join(self.untouched)}"
        return text + "."


def load_thesis_checkpoint(
    path: Path | str,
    vision: str = VISION,
    language_model: str = LANGUAGE_MODEL,
    *,
    tokenizer: str | None = None,
    num_heads: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.1,
) -> tuple[LightMedVLM, Processor, Account]:
    """The model of a thesis checkpoint, its processor, and the account of every key.

    `path` is a Lightning checkpoint of the report stages, of the VQA stage or of the baseline, with or without LoRA,
    complete or with its trainable parameters alone. The residual form of SASA is the one that stage used.
    `vision`, `language_model` and `tokenizer` name the backbones as `from_backbones` does; their weights are needed,
    and fetched, only where the checkpoint lacks them. What no weight tells must be said: `num_heads` of SASA,
    `lora_alpha` (the adapter's effect is alpha / r) and `lora_dropout`.

    The file is read with `weights_only=True`: no code in it can run. Raises UserError for a file that is no such
    checkpoint, a key without a place, a place without a key, and a second name that contradicts the first.
    """
    state = read_state_dict(path)
    prefix, stage, llm_prefix, options = _recognise(state, path)
    account = Account(stage)
    weights, sources = _translate(state, prefix, llm_prefix, path)
    has_encoder = any(name.startswith("vision_encoder.") for name in weights)
    has_llm = any(n.startswith("language_model.") and not lora.is_lora(n) and n not in TIED for n in weights)
    account.from_backbones = [n for n, has in (("encoder", has_encoder), ("language model", has_llm)) if not has]
    encoder, eye = load_vision(vision, random_init=has_encoder)
    llm, words = load_language_model(language_model, has_llm, tokenizer or language_model)
    if "num_queries" in options_of(options["name"]):
        num_queries = weights["connector.queries"].shape[0] if "connector.queries" in weights else 64
        options |= {"num_queries": num_queries, "num_heads": num_heads, "disease_head": False}
    # Inputs as the thesis prepares them: the image stretched to the encoder's square, at most two views.
    limits: dict[str, Any] = {"fit": "stretch", "max_views": 2, "max_report_tokens": 100}
    model, processor = assemble(encoder, eye, llm, words, options, **limits)
    ranks = {len(value) for name, value in weights.items() if ".lora_A." in name}
    if ranks:
        lora.add(model.language_model, ranks.pop(), lora_alpha, lora_dropout)
    _fill(model, weights, sources, account, path)
    _check_second_names(model, state, llm_prefix, account, path)
    return model.eval(), processor, account


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """The `state_dict` of a Lightning checkpoint; nothing but tensors and plain values is ever built from the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; give the path of a thesis .ckpt file.")
    try:
        with safe_globals(_LIGHTNING):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the object {wanted[1]}" if wanted else "objects that are no weights"
        raise UserError(
            f"{path} holds {what}, which is not loaded because it could run code; save the checkpoint's state_dict "
            "alone, as {'state_dict': ...}, and import that."
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path} is no PyTorch checkpoint ({str(error).splitlines()[0][:120]}).") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} has no state_dict of tensors; give a checkpoint as Lightning writes it.")
    return state


def _recognise(state: dict[str, Tensor], path: Path | str) -> tuple[str, str, str, dict]:
    found = [prefix for prefix in LAYOUTS if any(name.startswith(prefix) for name in state)]
    if len(found) != 1:
        raise UserError(
            f"{path} is no thesis checkpoint: of the connectors {', '.join(LAYOUTS)} it has {found or 'none'}; give a "
            "checkpoint of the report stages, the VQA stage or the baseline."
        )
    stage, llm_prefix, options = LAYOUTS[found[0]]
    return found[0], stage, llm_prefix, dict(options)


def _translate(
    state: dict[str, Tensor], prefix: str, llm_prefix: str, path: Path | str
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Our names -> weights, and our names -> the checkpoint's names they came from."""
    weights: dict[str, Tensor] = {}
    sources: dict[str, list[str]] = {}
    unknown: list[str] = []
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, value in state.items():
        if _is_second_name(name, llm_prefix):
            continue
        ours, part = _our_name(name, prefix, llm_prefix)
        if not ours:
            unknown.append(name)
        elif part:
            parts.setdefault(ours, {})[part] = (name, value)
        else:
            weights[ours], sources[ours] = value, [name]
    for ours, found in parts.items():  # timm fuses them in this order
        if set(found) != {"query", "key", "value"}:
            raise UserError(f"{path} has only {sorted(found)} of what {ours} is made of; the file is incomplete.")
        names, values = zip(*(found[part] for part in ("query", "key", "value")), strict=True)
        weights[ours], sources[ours] = torch.cat(values), list(names)
    if unknown:
        raise UserError(
            f"{path} has {len(unknown)} keys that belong to no part of the model, {unknown[0]!r} first; it was not "
            "written by the code of the thesis, or by another version of it."
        )
    if weights.get("connector.queries", torch.empty(0)).ndim == 3:
        weights["connector.queries"] = weights["connector.queries"].squeeze(0)  # (1, Q, D) there
    return weights, sources


def _our_name(name: str, prefix: str, llm_prefix: str) -> tuple[str, str]:
    """(our name, "query", "key" or "value" where it is a part of it); ("", "") for a key that is not known."""
    if name.startswith("visual_encoder."):
        ours, part = _encoder_name(name.removeprefix("visual_encoder."))
        return (f"vision_encoder.{ours}" if ours else ""), part
    if name.startswith(prefix):
        first, _, rest = name.removeprefix(prefix).partition(".")
        ours = ".".join(filter(None, (CONNECTOR.get(first, ""), rest)))
        return (f"connector.{ours}" if first in CONNECTOR else ""), ""
    if name.startswith("layer_norm."):
        return f"connector.norm.{name.removeprefix('layer_norm.')}", ""
    if name.startswith(llm_prefix):
        return f"language_model.{name.removeprefix(llm_prefix).removeprefix(PEFT)}", ""
    return "", ""


def _encoder_name(name: str) -> tuple[str, str]:
    block = re.fullmatch(r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
    if block:
        stage, number, inside, kind = block.groups(default="")
        place = f"layers.{stage}.blocks.{number}"
        fused = re.fullmatch(r"attention\.self\.(query|key|value)", inside)
        if fused:
            return f"{place}.attn.qkv{kind}", fused[1]
        return (f"{place}.{BLOCK[inside]}{kind}" if inside in BLOCK else ""), ""
    down = re.fullmatch(r"encoder\.layers\.(\d+)\.downsample\.(.+)", name)
    if down:
        return f"layers.{int(down[1]) + 1}.downsample.{down[2]}", ""
    for theirs, ours in ENCODER:
        match = re.fullmatch(theirs + r"(\.weight|\.bias)", name)
        if match:
            return ours + match[1], ""
    return "", ""


def _fill(
    model: LightMedVLM, weights: dict[str, Tensor], sources: dict[str, list[str]], account: Account, path: Path | str
) -> None:
    """Load in place; every weight must find its place, and every part be filled completely or not at all."""
    own, buffers = model.state_dict(), dict(model.named_buffers())
    loaded, unplaced = {}, []
    for name, value in weights.items():
        if name in own:
            loaded[name] = value
            account.loaded += sources[name]
        elif name in buffers:  # computed from the window's shape, here as there
            if not torch.equal(value.flatten(), buffers[name].flatten()):
                raise UserError(f"{path}: {sources[name][0]} is not that of this encoder; name the encoder it had.")
            account.recomputed += sources[name]
        else:
            unplaced += sources[name]
    missing = sorted(set(own) - set(loaded) - (TIED if model.config.text.tie_word_embeddings else set()))
    groups = {
        "vision_encoder.": "encoder" in account.from_backbones,
        "language_model.": "language model" in account.from_backbones,
    }
    lost = [n for n in missing if not any(n.startswith(p) and allowed for p, allowed in groups.items())]
    lost += [n for n in missing if lora.is_lora(n)]
    statistics = [n for n in own if n.startswith("connector.refine.") and n in buffers]
    if set(statistics) <= set(lost):  # a file of parameters alone has none of them
        account.untouched = statistics
        lost = [n for n in lost if n not in statistics]
    if lost or unplaced:
        raise UserError(
            f"{path} does not fit: our model misses {lost[:3] or 'nothing'}, the checkpoint's {unplaced[:3] or 'keys'} "
            "have no place; name the backbones it was trained with, or give a complete file."
        )
    try:
        model.load_state_dict(loaded, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} has weights of another shape ({reason}); name its own backbones.") from error


def _is_second_name(name: str, llm_prefix: str) -> bool:
    """A tied output head, or the input embedding under its second name."""
    heads = (f"{llm_prefix}lm_head.weight", f"{llm_prefix}{PEFT}lm_head.weight", "lm_head.weight")
    return name == "embed_tokens.weight" or name in heads


def _check_second_names(
    model: LightMedVLM, state: dict[str, Tensor], llm_prefix: str, account: Account, path: Path | str
) -> None:
    embedding = model.state_dict()[EMBEDDING]
    for name in (name for name in state if _is_second_name(name, llm_prefix)):
        if state[name].shape != embedding.shape or not torch.equal(state[name].to(embedding), embedding):
            raise UserError(
                f"{path}: {name} should be the language model's input embedding under another name, and differs; "
                "this model ties them, so the file cannot be imported faithfully."
            )
        account.second_names.append(name)
