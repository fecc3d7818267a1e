"""CheXbert as a labeler: BERT with one head per observation (Smit et al. 2020, arXiv 2004.09167).

Ours is a reader of its published weights: a BERT encoder and 14 linear heads on the first token, 13 with the classes
blank / present / absent / uncertain and one, No Finding, with blank / present.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS

HUB = ("StanfordAIMI/RRG_scorers", "chexbert.pth")
_TOKENIZER = "google-bert/bert-base-uncased"
# The order of the heads in the checkpoint.
HEADS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
_STATES = np.array([np.nan, 1.0, 0.0, -1.0])  # of class 0, 1, 2, 3
_BATCH, _MAX_TOKENS = 32, 512


def chexbert_labels(texts: Iterable[str], weights: str | Path = "", progress: bool = False) -> pd.DataFrame:
    """Label n texts; n x 14 as `labels.label_reports` describes it. An empty text mentions nothing.

    The tokenizer is BERT's (uncased), from the folder of `weights` where its files are there, else from the hub.
    On a GPU where there is one. Raises UserError where the weights or the tokenizer cannot be had.
    """
    import torch

    texts = _tidy(texts)
    path = _find_weights(weights)
    model = load_chexbert(path)
    states = np.full((len(texts), len(HEADS)), np.nan)
    mentioned = [i for i, text in enumerate(texts) if text]
    for rows, hidden in _first_tokens(model, _load_tokenizer(path.parent), texts, mentioned, progress):
        with torch.inference_mode():
            classes = [head(hidden).argmax(dim=1).cpu().numpy() for head in model["linear_heads"]]
        states[rows] = _STATES[np.stack(classes, axis=1)]
    return pd.DataFrame(states, columns=list(HEADS))[list(LABELS)]


def chexbert_embeddings(texts: Iterable[str], weights: str | Path = "") -> np.ndarray:
    """The last hidden state of the first token of n texts, `(n, 768)`: what SembScore compares.

    `weights`, tokenizer, device and errors as for `chexbert_labels`.
    """
    texts = _tidy(texts)
    path = _find_weights(weights)
    model = load_chexbert(path)
    vectors = np.zeros((len(texts), model["bert"].config.hidden_size), np.float32)
    for rows, hidden in _first_tokens(model, _load_tokenizer(path.parent), texts, range(len(texts))):
        vectors[rows] = hidden.cpu().numpy()
    return vectors


def _tidy(texts: Iterable[str]) -> list[str]:
    return [" ".join((text or "").split()) for text in texts]


def _first_tokens(model, tokenizer, texts: Sequence[str], chosen: Iterable[int], progress: bool = False):
    """Yields (rows, hidden `(rows, hidden size)`) of the chosen texts, batch by batch."""
    import torch
    from tqdm import tqdm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    order = sorted(chosen, key=lambda i: len(texts[i]))  # little padding
    for start in tqdm(range(0, len(order), _BATCH), desc="CheXbert", unit="batch", disable=not progress):
        rows = order[start : start + _BATCH]
        batch = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model["bert"](batch["input_ids"].to(device), batch["attention_mask"].to(device))[0][:, 0]
        yield rows, hidden


def load_chexbert(path: Path):
    """The model in evaluation mode: a ModuleDict of "bert" and "linear_heads", its size read off the weights."""
    import torch
    from torch import nn
    from transformers import BertConfig, BertModel

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # a pickle that cannot run code
        state = content.get("model_state_dict", content)
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        state.pop("bert.embeddings.position_ids", None)  # a constant that older transformers saved
        vocabulary, hidden = state["bert.embeddings.word_embeddings.weight"].shape
        layers = {name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=len(layers),
            num_attention_heads=hidden // 64,  # heads of 64 channels in every published BERT
            intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
            max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]),
        )
        heads = nn.ModuleList(nn.Linear(hidden, 2 if name == "No Finding" else 4) for name in HEADS)
        model = nn.ModuleDict({"bert": BertModel(config), "linear_heads": heads})
        model.load_state_dict(state)
    except Exception as error:  # torch raises many kinds; all mean that this is not the file
        what = " ".join(str(error).split())
        raise UserError(f"{path} does not hold CheXbert's weights ({what}); download {HUB[1]} again.") from error
    return model.eval()


def _find_weights(weights: str | Path) -> Path:
    if str(weights):
        path = Path(weights).expanduser()
        path = path / HUB[1] if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"CheXbert's weights are not at {path}; {_ADVICE}")
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(*HUB))
    except Exception as error:  # offline, not cached, no access: many kinds, one remedy
        what = f"CheXbert's weights could not be had from the hub ({type(error).__name__})"
        raise UserError(f"{what}; {_ADVICE}") from error


_ADVICE = f"download {HUB[1]} of {HUB[0]} from the Hugging Face hub and give its path, or label with the rules."


def _load_tokenizer(folder: Path):
    from transformers import AutoTokenizer, BertTokenizer

    try:
        if (folder / "vocab.txt").is_file():
            return BertTokenizer.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(_TOKENIZER)
    except Exception as error:
        raise UserError(
            f"BERT's tokenizer could not be had from the hub ({type(error).__name__}); "
            f"put vocab.txt of {_TOKENIZER} into {folder}."
        ) from error
