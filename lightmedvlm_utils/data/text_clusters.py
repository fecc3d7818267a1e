"""Clusters of report text: embeddings, UMAP, HDBSCAN, and names from distinctive terms.

Label vectors know fourteen words; the text knows the rest (granulomas, a hiatal hernia, low lung volumes). Two habits
keep the clusters from being about something else. Whole reports cluster by dictation template, so only the sentences
that state a finding are compared. And identical texts would be clusters of their own, as identical label vectors are,
so each distinct text counts once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lightmedvlm_utils.data.labels import label_sentence
from lightmedvlm_utils.data.reports import remove_priors
from lightmedvlm_utils.errors import UserError

NOTHING_STATED = "nothing abnormal stated"
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_HEADING = re.compile(r"\b(?:Findings|Impression): ")
# Sentences on what no label covers state a finding unless they deny one, name the film or speak of phone calls.
_NO_FINDING = re.compile(
    r"\b(?:no|not|without|clear|normal|normally|unremarkable|negative|free|intact|within normal limits|stable|midline|"
    r"views?|radiographs?|films?|images?|obtained|submitted|examination|comparison|discussed|notified|telephone|phone|"
    r"recommend\w*)\b"
)
_WORD = r"(?u)\b[a-z][a-z]+\b"
_MIN_UMAP = 200  # UMAP learns from neighborhoods and needs some hundreds of points
_BATCH = 64


def stated_findings(text: str) -> str:
    """The sentences of a cleaned report that state a finding, surely or not, less their comparisons with earlier
    studies ("unchanged since the prior" would be a cluster); "" where all is denied or normal.

    >>> stated_findings("Findings: No effusion. Small hiatal hernia. Impression: Possible pneumonia.")
    'Small hiatal hernia. Possible pneumonia.'
    """
    kept = []
    for sentence in _SENTENCE.split(remove_priors(_HEADING.sub("", text))):
        states = [state for _, state in label_sentence(sentence.lower())]
        if any(states) or (not states and not _NO_FINDING.search(sentence.lower())):
            kept.append(sentence)
    return " ".join(kept)


def embed_texts(texts: Sequence[str], encoder: str = "", size: int = 50, seed: int = 0) -> np.ndarray:
    """(n texts, d) embeddings of length 1 (0 where none of a text's words occurs in others); d is at most `size`, or
    the encoder's width.

    Without `encoder`: TF-IDF of words and word pairs, reduced by a truncated SVD (latent semantic analysis). With one,
    a folder or hub name of a sentence encoder (a BERT-like model): the mean of its last hidden states.
    """
    from sklearn.preprocessing import normalize

    if encoder:
        return normalize(_encode(texts, encoder))
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    rare = 5 if len(texts) >= 1000 else 2 if len(texts) >= 20 else 1
    weights = TfidfVectorizer(ngram_range=(1, 2), min_df=rare, sublinear_tf=True, token_pattern=_WORD)
    weighted = weights.fit_transform(texts)
    size = min(size, *(side - 1 for side in weighted.shape))
    return normalize(TruncatedSVD(max(size, 1), random_state=seed).fit_transform(weighted))


def _encode(texts: Sequence[str], encoder: str) -> np.ndarray:
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"There is no sentence encoder {encoder!r}; give its folder, or '' for TF-IDF.") from error
    vectors = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            list(texts[start : start + _BATCH]), padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        vectors.append(((hidden * mask).sum(1) / mask.sum(1)).float().numpy())
    return np.concatenate(vectors)


def reduce(vectors: np.ndarray, dims: int, seed: int = 0, min_dist: float = 0.0) -> tuple[np.ndarray, str]:
    """(n, d) -> ((n, dims), name of the method): UMAP; for fewer than 200 rows the main axes (PCA)."""
    if len(vectors) < _MIN_UMAP:
        from sklearn.decomposition import PCA

        return PCA(min(dims, *vectors.shape), random_state=seed).fit_transform(vectors), "PCA"
    import umap  # it compiles for many seconds, so only where it is used

    projection = umap.UMAP(n_components=dims, min_dist=min_dist, metric="cosine", random_state=seed, n_jobs=1)
    return projection.fit_transform(vectors), "UMAP"


def cluster_texts(
    texts: Sequence[str],
    min_cluster_size: int = 100,
    min_samples: int = 10,
    seed: int = 0,
    encoder: str = "",
    fit_texts: int = 20_000,
) -> np.ndarray:
    """Cluster n texts (of `stated_findings`): one id per row, -1 noise, 0 the cluster with the most rows.

    Distinct texts count once, in alphabetic order: the partition does not depend on the order of the rows. Empty texts
    are one cluster, where there are at least `min_cluster_size`. Of more than `fit_texts` distinct texts a random
    share is clustered and each of the others goes where its nearest neighbor among them went.
    """
    distinct, inverse = np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)
    ids = np.full(len(distinct), -1)
    stated = np.flatnonzero(distinct != "")
    if len(stated) >= max(2 * min_cluster_size, 5):
        vectors = embed_texts(distinct[stated].tolist(), encoder, seed=seed)
        known = np.linalg.norm(vectors, axis=1) > 0.5
        ids[stated[known]] = _cluster_vectors(vectors[known], min_cluster_size, min_samples, seed, fit_texts)
    if (counts := np.bincount(inverse, minlength=len(distinct)))[distinct == ""].sum() >= min_cluster_size:
        ids[distinct == ""] = ids.max() + 1
    names, position = np.unique(ids[ids >= 0], return_inverse=True)
    sizes = np.bincount(position, weights=counts[ids >= 0], minlength=len(names))
    ids[ids >= 0] = np.argsort(np.argsort(-sizes, kind="stable"))[position]
    return ids[inverse]


def _cluster_vectors(vectors: np.ndarray, min_size: int, min_samples: int, seed: int, fit_texts: int) -> np.ndarray:
    from hdbscan import HDBSCAN
    from sklearn.neighbors import NearestNeighbors

    fitted = np.arange(len(vectors))
    if len(vectors) > fit_texts:
        fitted = np.sort(np.random.default_rng(seed).choice(len(vectors), fit_texts, replace=False))
    found = HDBSCAN(min_cluster_size=min_size, min_samples=min_samples).fit_predict(reduce(vectors[fitted], 5, seed)[0])
    if len(fitted) == len(vectors):
        return found
    return found[NearestNeighbors(n_neighbors=1).fit(vectors[fitted]).kneighbors(vectors, return_distance=False)[:, 0]]


def name_texts(texts: Sequence[str], clusters: np.ndarray, top: int = 3) -> dict[int, str]:
    """Name of every cluster id (noise left out): the `top` words or word pairs that set its texts apart.

    A term scores p log(p / q), with p the share of the cluster's texts that hold it and q that of all texts (the
    cluster's part of the Kullback-Leibler divergence); words inside a chosen pair do not count again.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    clusters = np.asarray(clusters)
    stop = sorted(word for word in ENGLISH_STOP_WORDS if len(word) > 1)
    counter = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=_WORD, stop_words=stop)
    try:
        holds = counter.fit_transform(texts)
    except ValueError:  # no text has a word
        return {int(cluster): NOTHING_STATED for cluster in np.unique(clusters[clusters >= 0])}
    terms, overall = counter.get_feature_names_out(), np.asarray(holds.mean(axis=0)).ravel()
    names = {}
    for cluster in np.unique(clusters[clusters >= 0]):
        share = np.asarray(holds[clusters == cluster].mean(axis=0)).ravel()
        score = share * np.log(np.maximum(share, 1e-12) / overall)
        chosen: list[str] = []
        for term in terms[np.argsort(-score, kind="stable")[: 5 * top]]:
            words = set(term.split())
            if not any(words & set(other.split()) for other in chosen):
                chosen.append(term)
        names[int(cluster)] = ", ".join(chosen[:top]) if share.max() > 0 else NOTHING_STATED
    return names
