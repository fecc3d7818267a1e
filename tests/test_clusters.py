"""Canonical clusters: unique, equal to the package's reference on expanded rows, exactly scored; balancing."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import silhouette_score

from lightmedvlm_utils.data.balance import STRATEGIES, balance, balance_table
from lightmedvlm_utils.data.clusters import (
    NOISE_NAME,
    cluster_labels,
    label_matrix,
    merge_equal_names,
    name_clusters,
    silhouette,
)
from lightmedvlm_utils.data.openi import package_file
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS


@pytest.fixture(scope="module")
def chexpert() -> pd.DataFrame:
    """3,000 real CheXpert label rows, from torchxrayvision."""
    return pd.read_csv(package_file("chexpert_train.csv.gz"), usecols=list(LABELS)).sample(3000, random_state=0)


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    one_to_one = len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))
    return one_to_one and all((a == -1) == (b == -1) for a, b in pairs)


@pytest.mark.parametrize(("size", "samples"), [(100, 10), (20, 5), (15, 20), (4, 2)])
def test_equals_the_package_on_expanded_rows(chexpert, size, samples):
    import hdbscan

    reference = hdbscan.HDBSCAN(
        min_cluster_size=size - 1, min_samples=samples + 1, match_reference_implementation=True
    ).fit_predict(label_matrix(chexpert).astype(float))
    ours = cluster_labels(chexpert, size, samples)
    assert ours.max() >= 0
    assert same_partition(ours, reference)


def test_equals_the_package_at_ten_thousand_rows():
    import hdbscan

    rows = pd.read_csv(package_file("chexpert_train.csv.gz"), usecols=list(LABELS)).sample(10_000, random_state=1)
    reference = hdbscan.HDBSCAN(min_cluster_size=99, min_samples=11, match_reference_implementation=True)
    assert same_partition(cluster_labels(rows), reference.fit_predict(label_matrix(rows).astype(float)))


def test_unique_under_every_order_of_the_rows(chexpert):
    ids = cluster_labels(chexpert, 20, 5)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(chexpert))
        assert (cluster_labels(chexpert.iloc[order], 20, 5) == ids[order]).all()


def test_identical_rows_share_a_cluster_and_ids_fall_with_size(chexpert):
    ids = cluster_labels(chexpert, 20, 5)
    groups = pd.DataFrame(label_matrix(chexpert)).assign(cluster=ids)
    assert (groups.groupby(list(range(14)))["cluster"].nunique() == 1).all()
    sizes = np.bincount(ids[ids >= 0])
    assert sizes.min() >= 20 and (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_too_little_to_cluster_is_noise(rows):
    assert (cluster_labels(np.ones((rows, 14)), 4, 2) == -1).all()
    assert (cluster_labels(np.eye(14)[:rows], 4, 2) == -1).all()


def test_other_values_and_settings_are_refused():
    with pytest.raises(UserError):
        cluster_labels(np.full((5, 14), 2.0))
    with pytest.raises(UserError):
        cluster_labels(np.ones((5, 14)), min_cluster_size=1)


@pytest.mark.parametrize("with_noise", [True, False])
def test_silhouette_is_exact(chexpert, with_noise):
    matrix = label_matrix(chexpert).astype(float)
    # Arbitrary groups of 1 to 400 rows that tear identical rows apart, with noise
    ids = np.random.default_rng(0).choice([-1, 0, 1, 2], size=len(matrix), p=[0.2, 0.5, 0.2, 0.1])
    ids[5] = 3
    kept = np.full(len(ids), True) if with_noise else ids >= 0
    expected = silhouette_score(matrix[kept], ids[kept])
    assert silhouette(chexpert, ids, with_noise) == pytest.approx(expected, abs=1e-9)
    assert np.isnan(silhouette(chexpert, np.zeros(len(matrix)), with_noise))


def table(*rows: dict) -> pd.DataFrame:
    return pd.DataFrame([{label: row.get(label, np.nan) for label in LABELS} for row in rows])


def test_names():
    labels = table(
        {"Edema": 1, "Cardiomegaly": 1, "Pneumonia": -1},
        {"Pneumonia": -1},
        {},
        {"Edema": 1, "Cardiomegaly": 1},
        {"Fracture": 1},
    )
    names = name_clusters(labels, np.array([0, 1, 2, 3, -1]))
    assert names == {
        0: "Cardiomegaly + Edema",
        1: "Uncertain: Pneumonia",
        2: "Nothing mentioned",
        3: "Cardiomegaly + Edema",
        -1: NOISE_NAME,
    }
    assert merge_equal_names(np.array([3, 0, 1, -1]), names).tolist() == [0, 0, 1, -1]
    many = table({label: 1 for label in LABELS})
    assert name_clusters(many, np.array([0]))[0].count(" + ") == 2


@pytest.fixture(scope="module")
def train(chexpert) -> pd.DataFrame:
    frame = chexpert.assign(study_id=range(len(chexpert)), cluster=cluster_labels(chexpert, 20, 5))
    return frame.reset_index(drop=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_balance_is_deterministic_and_invents_nothing(train, strategy):
    balanced = balance(train, strategy, seed=1)
    pd.testing.assert_frame_equal(balanced, balance(train, strategy, seed=1))
    shuffled = balance(train.sample(frac=1, random_state=0), strategy, seed=1)
    pd.testing.assert_frame_equal(balanced, shuffled)
    assert set(balanced["study_id"]) <= set(train["study_id"])
    assert list(balanced.columns) == list(train.columns)


def test_none_keeps_everything(train):
    pd.testing.assert_frame_equal(balance(train, "none", 0), train)


def test_cap_keeps_noise_and_small_clusters(train):
    balanced = balance(train, "cap", 0, cap=0.02)
    before, after = train["cluster"].value_counts(), balanced["cluster"].value_counts()
    assert before.drop(-1).max() > 60
    assert after.to_dict() == {cluster: n if cluster < 0 else min(n, 60) for cluster, n in before.items()}


def test_thesis_drops_noise_and_a_share_of_no_finding(train):
    balanced = balance(train, "thesis", 0)
    assert (balanced["cluster"] >= 0).all()
    normal = train[(train["No Finding"] == 1) & (train["cluster"] >= 0)]
    left = (balanced["No Finding"] == 1).sum()
    assert len(train) - len(balanced) == (train["cluster"] < 0).sum() + len(normal) - left
    assert 0 < left < len(normal)


def test_inverse_frequency_lifts_rare_labels(train):
    balanced = balance(train, "inverse-frequency", 0)
    assert len(balanced) == len(train)
    before, after = ((frame[list(LABELS)] == 1).mean() for frame in (train, balanced))
    assert after[before.idxmin()] > 1.5 * before.min()


def test_random_is_as_small_as_cap_and_no_more_balanced(train):
    balanced = balance(train, "random", 0, cap=0.02)
    assert len(balanced) == len(balance(train, "cap", 0, cap=0.02)) < len(train) and balanced["study_id"].is_unique
    before, after = ((frame[list(LABELS)] == 1).mean() for frame in (train, balanced))
    assert (after - before).abs().max() < 0.05


def test_balance_table_and_errors(train):
    counts = balance_table(train, 0)
    assert list(counts.index) == ["Studies", "Distinct studies", *LABELS]
    assert list(counts.columns) == list(STRATEGIES)
    assert counts.loc["Studies", "none"] == len(train)
    assert counts.loc["Edema", "none"] == (train["Edema"] == 1).sum()
    with pytest.raises(UserError, match="best"):
        balance(train, "best", 0)
    with pytest.raises(UserError, match="cluster"):
        balance(train.drop(columns="cluster"), "cap", 0)
