"""CheXbert's weights behind label_reports, with a tiny random BERT under the names of the published checkpoint."""

import numpy as np
import pytest
import torch

from lightmedvlm_utils.data.chexbert import HEADS
from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS


def test_heads_and_classes_are_read_in_their_order(chexbert_file):
    texts = ["No effusion.", "", None, "The heart is large. " * 200]  # the last is longer than BERT reads
    labels = label_reports(texts, labeler="chexbert", weights=chexbert_file)
    assert tuple(labels.columns) == LABELS and labels.shape == (4, 14)
    assert labels.iloc[[1, 2]].isna().all(axis=None)
    classes = {0: np.nan, 1: 1.0, 2: 0.0, 3: -1.0}
    for number, name in enumerate(HEADS):
        expected = classes[number % 2 if name == "No Finding" else number % 4]
        assert np.array_equal(labels[name].iloc[[0, 3]], [expected] * 2, equal_nan=True), name


def test_padding_does_not_change_a_label(chexbert_file):
    content = torch.load(chexbert_file, weights_only=True)
    for number in range(len(HEADS)):
        weight = content["model_state_dict"][f"module.linear_heads.{number}.weight"]
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    torch.save(content, chexbert_file)
    texts = ["no effusion", "small edema . " * 20, "the heart is large", "edema"]
    together = label_reports(texts, labeler="chexbert", weights=chexbert_file.parent)
    alone = [label_reports([text], labeler="chexbert", weights=chexbert_file) for text in texts]
    for row, single in enumerate(alone):
        assert together.iloc[[row]].reset_index(drop=True).equals(single)
    assert together.nunique(dropna=False).max() > 1


def test_missing_or_other_weights_are_said_so(chexbert_file, tmp_path):
    with pytest.raises(UserError, match=r"are not at .*absent\.pth.*rules"):
        label_reports(["No edema."], labeler="chexbert", weights=tmp_path / "absent.pth")
    with pytest.raises(UserError, match="from the hub"):  # the tests are offline
        label_reports(["No edema."], labeler="chexbert")
    content = torch.load(chexbert_file, weights_only=True)
    del content["model_state_dict"]["module.linear_heads.13.bias"]
    torch.save(content, chexbert_file)
    with pytest.raises(UserError, match=r"chexbert\.pth does not hold.*linear_heads\.13\.bias"):
        label_reports(["No edema."], labeler="chexbert", weights=chexbert_file)
    with pytest.raises(UserError, match="rules or chexbert"):
        label_reports(["No edema."], labeler="negbio")
