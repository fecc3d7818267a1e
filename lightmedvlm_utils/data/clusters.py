"""HDBSCAN on label vectors, made unique: the same partition whatever the order of the rows.

14 columns of -1, 0 and 1 give few distinct vectors ("patterns") and a handful of distances. HDBSCAN breaks
the many ties by row order, so its usual call gives another partition after every shuffle. Here each pattern
carries its multiplicity and equal distances are resolved at once, as Campello et al. (2013) define the
hierarchy: the result is unique, and on a real label table about 200 times faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import LABELS

NOISE_NAME = "Rare combination (noise)"
_CONDENSED = [("parent", np.intp), ("child", np.intp), ("lambda_val", float), ("child_size", np.intp)]
_BLOCK = 512  # rows of the distance matrix held at once: 512 x 10,000 patterns are 20 MB


@dataclass(frozen=True)
class Patterns:
    """Distinct rows of a matrix: values (n, columns), counts (n,), inverse (rows,): each row's pattern."""

    values: np.ndarray
    counts: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray) -> Patterns:
        """Patterns of an integer-valued matrix, in lexicographic order. Each row becomes one number in mixed
        radix first: sorting numbers is many times faster than sorting rows."""
        matrix = np.asarray(matrix).astype(np.int64)
        digits = matrix - matrix.min(axis=0)
        radix = np.append(digits[:, 1:].max(axis=0) + 1, 1)
        codes = digits @ np.cumprod(radix[::-1])[::-1]
        _, first, inverse, counts = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
        return cls(matrix[first], counts, inverse)

    def squared_distances(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (rows, squared Euclidean distances (block, n)); exact, since label states are integers."""
        values = self.values.astype(np.float32)
        norms = (values**2).sum(axis=1)
        for start in range(0, len(values), _BLOCK):
            rows = slice(start, start + _BLOCK)
            yield rows, norms[rows, None] + norms - 2 * values[rows] @ values.T


def label_matrix(labels: pd.DataFrame | np.ndarray) -> np.ndarray:
    """Label states as the thesis clusters them: (rows, 14), blank -> 0, uncertain stays -1."""
    if isinstance(labels, pd.DataFrame):
        labels = labels[list(LABELS)]
    matrix = np.nan_to_num(np.asarray(labels, dtype=np.float32), nan=0.0)
    if matrix.ndim != 2 or not np.isin(matrix, (-1, 0, 1)).all():
        raise UserError("Label vectors must hold only 1, 0, -1 and blanks; run notebook 01 again.")
    return matrix


def cluster_labels(labels: pd.DataFrame | np.ndarray, min_cluster_size: int = 100, min_samples: int = 10) -> np.ndarray:
    """Cluster label vectors: one id per row, -1 for noise; 0 is the largest cluster.

    `labels` has rows x 14 states (1, 0, -1, blank). Equal, up to renaming, to
    `hdbscan.HDBSCAN(min_cluster_size - 1, min_samples + 1, match_reference_implementation=True)` on the rows
    (the flag shifts both parameters back by one).
    """
    if min_cluster_size < 2 or min_samples < 1:
        raise UserError("min_cluster_size must be at least 2 and min_samples at least 1.")
    patterns = Patterns.of(label_matrix(labels))
    if len(patterns.counts) < 2:
        return np.full(len(patterns.inverse), -1)
    core = _core_distances(patterns, min_samples)
    hierarchy = _hierarchy(patterns.counts, core, *_spanning_tree(patterns, core))
    condensed = _condense(hierarchy, len(core), patterns.counts, min_cluster_size)
    return _by_size(_select(condensed), patterns)


def _core_distances(patterns: Patterns, min_samples: int) -> np.ndarray:
    """Squared distance within which a row of each pattern has min_samples others (duplicates count)."""
    wanted = min(min_samples + 1, patterns.counts.sum())
    counts = patterns.counts.astype(np.float32)
    core = np.full(len(counts), -1, dtype=np.int64)
    for rows, squared in patterns.squared_distances():
        level = 0
        while (core[rows] < 0).any():  # few levels: squared distances are small integers
            enough = (squared <= level) @ counts >= wanted
            core[rows] = np.where((core[rows] < 0) & enough, level, core[rows])
            level += 1
    return core


def _spanning_tree(patterns: Patterns, core: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prim's minimum spanning tree under squared mutual reachability: edges (n - 1, 2), weights (n - 1,)."""
    values = patterns.values.astype(np.float32)
    norms = (values**2).sum(axis=1)
    n = len(core)
    reach = np.full(n, np.iinfo(np.int64).max)
    source = np.zeros(n, dtype=np.intp)
    outside = np.ones(n, dtype=bool)
    edges, weights = np.empty((n - 1, 2), dtype=np.intp), np.empty(n - 1, dtype=np.int64)
    current = 0
    for step in range(n - 1):
        outside[current] = False
        squared = (norms + norms[current] - 2 * (values @ values[current])).astype(np.int64)
        mutual = np.maximum(np.maximum(squared, core), core[current])
        closer = outside & (mutual < reach)
        reach[closer], source[closer] = mutual[closer], current
        nearest = int(np.argmin(np.where(outside, reach, np.iinfo(np.int64).max)))
        edges[step], weights[step] = (source[nearest], nearest), reach[nearest]
        current = nearest
    return edges, weights


@dataclass(frozen=True)
class _Node:
    """A connected component at a height: the components it merges and the patterns whose rows join here."""

    height: float
    children: list[_Node]
    patterns: list[int]
    size: int

    def members(self) -> list[int]:
        found, stack = [], [self]
        while stack:
            node = stack.pop()
            found += node.patterns
            stack += node.children
        return found


def _hierarchy(counts: np.ndarray, core: np.ndarray, edges: np.ndarray, weights: np.ndarray) -> _Node:
    """Merge from below, all equal heights at once; identical rows join each other at their core distance."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(core)
    node_of: dict[int, _Node] = {}  # by component label of the level before
    previous = np.arange(n)
    for height in np.unique(np.concatenate([core, weights])):
        low = edges[weights <= height]
        graph = coo_matrix((np.ones(len(low)), (low[:, 0], low[:, 1])), shape=(n, n))
        component = connected_components(graph, directed=False)[1]
        node_of = _merge_level(float(height), component, previous, node_of, core, counts)
        previous = component
    (root,) = node_of.values()
    return root


def _merge_level(height, component, previous, node_of, core, counts) -> dict[int, _Node]:
    """The components of one level, made from those of the level below and the patterns that join at it."""
    born = np.flatnonzero(core == height)
    children: dict[int, dict[int, _Node]] = {}
    joining: dict[int, list[int]] = {}
    for pattern in np.flatnonzero(core < height):
        below = int(previous[pattern])
        children.setdefault(int(component[pattern]), {})[below] = node_of[below]
    for pattern in born:
        joining.setdefault(int(component[pattern]), []).append(int(pattern))
    nodes = {}
    for label in children.keys() | joining.keys():
        parts, patterns = list(children.get(label, {}).values()), joining.get(label, [])
        if len(parts) == 1 and not patterns:
            nodes[label] = parts[0]  # nothing happened to this component
        else:
            size = sum(part.size for part in parts) + int(counts[patterns].sum())
            nodes[label] = _Node(height, parts, patterns, size)
    return nodes


def _condense(root: _Node, n: int, counts: np.ndarray, min_cluster_size: int) -> np.ndarray:
    """hdbscan's condensed tree over patterns: what leaves which cluster at which density 1 / distance.

    A component that falls apart into several parts of at least min_cluster_size rows ends and they begin;
    with one such part it goes on and loses the small ones. Where the small ones together are large, they count
    as a part: broken one by one, as the package does, ties leave some of them together. (Only there does the
    package's own partition still hang on the order of the rows, and may differ from ours.)
    """
    edges: list[tuple] = []
    stack, next_label = [(root, n)], n + 1
    while stack:
        node, cluster = stack.pop()
        density = node.height**-0.5 if node.height else np.inf
        large = [child for child in node.children if child.size >= min_cluster_size]
        leaving = list(node.patterns)
        for child in node.children:
            leaving += child.members() if child.size < min_cluster_size else []
        edges += [(cluster, pattern, density, counts[pattern]) for pattern in leaving]
        if len(large) == 1 and counts[leaving].sum() < min_cluster_size:
            stack.append((large[0], cluster))
            continue
        for child in large:
            edges.append((cluster, next_label, density, child.size))
            stack.append((child, next_label))
            next_label += 1
    return np.array(edges, dtype=_CONDENSED)


def _select(condensed: np.ndarray) -> np.ndarray:
    """Cluster of every pattern by excess of mass, through hdbscan's own stability and selection functions."""
    from hdbscan._hdbscan_tree import compute_stability, get_clusters

    stability = compute_stability(condensed)  # with the multiplicities
    structure = condensed.copy()
    n = condensed["parent"].min()
    structure["child_size"][condensed["child"] < n] = 1  # selection tells points from clusters by size 1
    largest = int(condensed["child_size"].sum()) + 1  # 0 would mean "number of points", here of patterns
    return get_clusters(structure, stability, match_reference_implementation=True, max_cluster_size=largest)[0]


def _by_size(chosen: np.ndarray, patterns: Patterns) -> np.ndarray:
    """Rename the clusters of the patterns by falling number of rows and spread them over the rows."""
    ids, position = np.unique(chosen[chosen >= 0], return_inverse=True)
    sizes = np.bincount(position, weights=patterns.counts[chosen >= 0], minlength=len(ids))
    renamed = np.full(len(chosen), -1)
    renamed[chosen >= 0] = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")[position]
    return renamed[patterns.inverse]


def silhouette(labels: pd.DataFrame | np.ndarray, clusters: np.ndarray, with_noise: bool) -> float:
    """Mean silhouette (Rousseeuw 1987), exact, computed from distinct vectors with weights.

    `with_noise` counts all noise rows as one cluster, as the thesis did; otherwise they are left out. NaN
    where fewer than two clusters are left.
    """
    matrix, clusters = label_matrix(labels), np.asarray(clusters)
    kept = np.full(len(clusters), True) if with_noise else clusters >= 0
    names, cluster = np.unique(clusters[kept], return_inverse=True)
    if len(names) < 2:
        return float("nan")
    # Identical rows may lie in different clusters (not in ours): a pattern here is a vector in a cluster.
    joint = Patterns.of(np.column_stack([matrix[kept], cluster]))
    own = joint.values[:, -1].astype(int)
    vectors = Patterns(joint.values[:, :-1], joint.counts, joint.inverse)
    mass = np.zeros((len(own), len(names)), dtype=np.float64)
    mass[np.arange(len(own)), own] = joint.counts
    sizes = mass.sum(axis=0)
    total = 0.0
    for rows, squared in vectors.squared_distances():
        sums = np.sqrt(squared.astype(np.float64)) @ mass
        total += float(_silhouettes(sums, own[rows], sizes) @ joint.counts[rows])
    return total / len(cluster)


def _silhouettes(sums: np.ndarray, own: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Silhouette per pattern from its summed distances to every cluster, (block, clusters)."""
    rows = np.arange(len(own))
    within = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[rows, own] = np.inf
    nearest = means.min(axis=1)
    widest = np.maximum(within, nearest)
    score = np.divide(nearest - within, widest, out=np.zeros_like(within), where=widest > 0)
    return np.where(sizes[own] == 1, 0.0, score)


def name_clusters(labels: pd.DataFrame, clusters: np.ndarray, threshold: float = 0.3) -> dict[int, str]:
    """Name of every cluster id: its up to three most frequent labels that are positive in more than
    `threshold` of its rows; else those uncertain in as many. Different clusters may share a name."""
    matrix = label_matrix(labels)
    names = {}
    for cluster in np.unique(clusters):
        rows = matrix[np.asarray(clusters) == cluster]
        positive, uncertain = _top(rows == 1, threshold), _top(rows == -1, threshold)
        fallback = "Uncertain: " + " + ".join(uncertain) if uncertain else "Nothing mentioned"
        names[int(cluster)] = " + ".join(positive) or fallback
    if -1 in names:
        names[-1] = NOISE_NAME
    return names


def _top(states: np.ndarray, threshold: float) -> list[str]:
    shares = states.mean(axis=0)
    best = np.argsort(-shares, kind="stable")[:3]
    return [LABELS[column] for column in sorted(best) if shares[column] > threshold]


def merge_equal_names(clusters: np.ndarray, names: dict[int, str]) -> np.ndarray:
    """Cluster ids after joining clusters of the same name into the first (largest) of them."""
    first: dict[str, int] = {}
    for cluster in sorted(names):
        first.setdefault(names[cluster], cluster)
    return np.array([first[names[int(cluster)]] for cluster in clusters], dtype=int)
