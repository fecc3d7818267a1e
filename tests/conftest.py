"""Tiny random models for the tests: real classes, no weights to download, no mocks."""

import os
import shutil
import string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] no effusion edema small . the heart is large"  # of the tiny BERTs
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in parallel, and their models are tiny


def pytest_collection_modifyitems(items):
    """The course at smoke takes longest: begin with it, while other processes do the rest."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


@pytest.fixture
def clone(tmp_path):
    """A copy of the project that a test may edit."""
    for name in ("lightmedvlm_utils", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from lightmedvlm_utils.pretrain.language import train_tokenizer

    text = "Findings: There is a small left pleural effusion. Impression: No pneumothorax. yes no system user "
    return train_tokenizer([text * 4, string.printable])


@pytest.fixture
def make_model(tiny_tokenizer):
    """A factory of (model, processor) with 28-pixel images: 7 x 7 patches, one Swin stage, two Qwen3 layers."""
    import torch
    from transformers import Qwen3Config

    from lightmedvlm_utils.model.backbones import connector_words
    from lightmedvlm_utils.model.configuration import LightMedVLMConfig
    from lightmedvlm_utils.model.connectors import options_of
    from lightmedvlm_utils.model.modeling import LightMedVLM
    from lightmedvlm_utils.model.processing import IMAGE_TOKEN, Processor

    def make(connector="sasa", max_views=1, views="mean", **options):
        torch.manual_seed(0)
        known = options_of(connector)
        options = {name: value for name, value in (("num_queries", 16), ("num_heads", 4)) if name in known} | options
        text = Qwen3Config(
            vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        )  # fmt: skip
        vision = {
            "architecture": "swin_tiny_patch4_window7_224",
            "arguments": {"img_size": 28, "embed_dim": 16, "depths": [2], "num_heads": [2]},
        }
        config = LightMedVLMConfig(
            vision=vision,
            text=text,
            connector={"name": connector, **options},
            image_token_id=tiny_tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            views=views,
        )
        model = LightMedVLM(config)
        model.connector.start_from_words(connector_words(model.language_model, tiny_tokenizer))
        tokens = model.connector.num_output_tokens
        processor = Processor(
            tiny_tokenizer, 28, (0.5,) * 3, (0.25,) * 3, tokens, max_views, max_report_tokens=24, views=views
        )
        return model.eval(), processor

    return make


@pytest.fixture
def chexbert_file(tmp_path):
    """A tiny CheXbert as its authors saved theirs: of a DataParallel model, in old names, with its training."""
    import torch
    from transformers import BertConfig, BertModel

    from lightmedvlm_utils.data.chexbert import HEADS

    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(vocab_size=len(WORDS.split()), hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
                   intermediate_size=32, max_position_embeddings=512)
    )  # fmt: skip
    state = {f"module.bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    for number, name in enumerate(HEADS):
        classes = 2 if name == "No Finding" else 4
        # Whatever the text: class `number` mod 4 (mod 2 for No Finding) wins.
        state[f"module.linear_heads.{number}.weight"] = torch.zeros(classes, 64)
        state[f"module.linear_heads.{number}.bias"] = torch.eye(classes)[number % classes]
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}, tmp_path / "chexbert.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS.split()))
    return tmp_path / "chexbert.pth"
