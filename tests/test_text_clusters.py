"""Clusters of report text: what is compared, one partition for every order of the rows, names."""

import numpy as np
import pytest

from lightmedvlm_utils.data.text_clusters import (
    NOTHING_STATED,
    cluster_texts,
    embed_texts,
    name_texts,
    stated_findings,
)
from lightmedvlm_utils.errors import UserError

SIDES = ("left", "right", "bilateral", "basal", "apical")
SIZES = ("small", "moderate", "large", "tiny", "mild", "trace")
KINDS = ("pleural effusion layering dependently", "hiatal hernia behind the heart", "rib fracture with callus")


def texts(copies: int = 1) -> tuple[list[str], np.ndarray]:
    """90 distinct sentences of three kinds, and 20 empty texts; with the kind of each (-1 for the empty ones)."""
    made = [(f"{size} {side} {kind}.", k) for k, kind in enumerate(KINDS) for size in SIZES for side in SIDES]
    made = made * copies + [("", -1)] * 20
    return [text for text, _ in made], np.array([kind for _, kind in made])


@pytest.mark.parametrize(
    ("report", "stated"),
    [
        ("Findings: The lungs are clear. No effusion. Impression: Normal chest.", ""),
        ("Findings: Small hiatal hernia. Impression: Possible pneumonia.", "Small hiatal hernia. Possible pneumonia."),
        ("No pneumothorax, but a small effusion.", "No pneumothorax, but a small effusion."),
        ("Frontal and lateral views were obtained. Calcified granuloma.", "Calcified granuloma."),
        ("Cardiomegaly is unchanged since the prior study. Discussed by phone.", "Cardiomegaly."),
        ("", ""),
    ],
)
def test_only_sentences_that_state_a_finding_are_compared(report, stated):
    assert stated_findings(report) == stated


def test_clusters_are_the_kinds_and_names_say_so():
    rows, kinds = texts()
    ids = cluster_texts(rows, min_cluster_size=10, min_samples=3)
    for kind in range(3):
        found, counts = np.unique(ids[kinds == kind], return_counts=True)
        assert counts.max() >= 25 and found[counts.argmax()] >= 0
    assert len(set(ids[kinds == -1])) == 1 and ids[kinds == -1][0] >= 0
    names = name_texts(rows, ids)
    assert names[ids[-1]] == NOTHING_STATED
    assert "hernia" in names[ids[kinds == 1][0]] and "fracture" in names[ids[kinds == 2][0]]


@pytest.mark.parametrize("copies", [1, 3])
def test_the_order_of_the_rows_and_duplicates_do_not_matter(copies):
    rows, _ = texts(copies)
    ids = cluster_texts(rows, min_cluster_size=10, min_samples=3)
    assert len({(text, cluster) for text, cluster in zip(rows, ids, strict=True)}) == len(set(rows))
    sizes = np.bincount(ids[ids >= 0])
    assert (np.diff(sizes) <= 0).all()
    order = np.random.default_rng(0).permutation(len(rows))
    assert (cluster_texts([rows[i] for i in order], min_cluster_size=10, min_samples=3) == ids[order]).all()


def test_of_many_texts_a_share_is_clustered_and_the_others_join_it():
    rows, kinds = texts()
    ids = cluster_texts(rows, 10, 3, fit_texts=60)
    for kind in range(3):
        assert np.unique(ids[kinds == kind], return_counts=True)[1].max() >= 20


def test_too_few_texts_are_noise():
    assert (cluster_texts(["Edema.", "Effusion.", ""], 4, 2) == -1).all()
    assert cluster_texts(["", "", "", ""], 4, 2).tolist() == [0] * 4
    assert name_texts(["", ""], np.array([0, 0])) == {0: NOTHING_STATED}


def test_embeddings_have_length_one(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer

    rows = texts()[0][:40]
    vectors = embed_texts(rows, size=10)
    assert vectors.shape == (40, 10) and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "small", "effusion", "hernia"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    BertModel(
        BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path)
    encoded = embed_texts(["small effusion", "hernia", "small small effusion effusion"], str(tmp_path))
    assert encoded.shape == (3, 16) and np.allclose(np.linalg.norm(encoded, axis=1), 1, atol=1e-5)
    assert np.allclose(encoded[1], embed_texts(["hernia"], str(tmp_path))[0], atol=1e-5)  # padding has no weight
    with pytest.raises(UserError, match="no sentence encoder"):
        embed_texts(rows, str(tmp_path / "absent"))
