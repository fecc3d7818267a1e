"""CheXbert's weights behind label_reports, with a tiny random BERT under the names of the published checkpoint."""

import numpy as np
import pytest
import torch

from lightmedvlm_utils.data.chexbert import HEADS
from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] no effusion edema small . the heart is large"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as its authors saved it: of a DataParallel model, in transformers 2's names, with its training."""
    from transformers import BertConfig, BertModel

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


def test_heads_and_classes_are_read_in_their_order(checkpoint):
    texts = ["No effusion.", "", None, "The heart is large. " * 200]  # the last is longer than BERT reads
    labels = label_reports(texts, labeler="chexbert", weights=checkpoint)
    assert tuple(labels.columns) == LABELS and labels.shape == (4, 14)
    assert labels.iloc[[1, 2]].isna().all(axis=None)
    classes = {0: np.nan, 1: 1.0, 2: 0.0, 3: -1.0}
    for number, name in enumerate(HEADS):
        expected = classes[number % 2 if name == "No Finding" else number % 4]
        assert np.array_equal(labels[name].iloc[[0, 3]], [expected] * 2, equal_nan=True), name


def test_padding_does_not_change_a_label(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    for number in range(len(HEADS)):
        weight = content["model_state_dict"][f"module.linear_heads.{number}.weight"]
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    torch.save(content, checkpoint)
    texts = ["no effusion", "small edema . " * 20, "the heart is large", "edema"]
    together = label_reports(texts, labeler="chexbert", weights=checkpoint.parent)
    alone = [label_reports([text], labeler="chexbert", weights=checkpoint) for text in texts]
    for row, single in enumerate(alone):
        assert together.iloc[[row]].reset_index(drop=True).equals(single)
    assert together.nunique(dropna=False).max() > 1


def test_missing_or_other_weights_are_said_so(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"are not at .*absent\.pth.*rules"):
        label_reports(["No edema."], labeler="chexbert", weights=tmp_path / "absent.pth")
    with pytest.raises(UserError, match="from the hub"):  # the tests are offline
        label_reports(["No edema."], labeler="chexbert")
    content = torch.load(checkpoint, weights_only=True)
    del content["model_state_dict"]["module.linear_heads.13.bias"]
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match=r"chexbert\.pth does not hold.*linear_heads\.13\.bias"):
        label_reports(["No edema."], labeler="chexbert", weights=checkpoint)
    with pytest.raises(UserError, match="rules or chexbert"):
        label_reports(["No edema."], labeler="negbio")
