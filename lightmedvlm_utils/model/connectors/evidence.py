"""SASA's eye: evidence for each finding at each place of the image, pooled into a probability.

A softmax over places has to peak somewhere, also where there is nothing to see, and a query that only has to help a
language model may find what it needs in any token, since the last stage of an encoder mixes them all. So attention by
itself does not show where a finding is. Here the probability of a finding *is* the pooled evidence of its places, the
attention is the share of each place in it, and what a query attends to cannot differ from what it is judged by. Pooling
of local evidence is multiple-instance learning (Ilse et al. 2018, arXiv 1802.04712); log-sum-exp as the pool: Pinheiro
and Collobert 2015 (arXiv 1411.6228).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from lightmedvlm_utils.model.connectors.base import sine_positions

CELLS = 8  # the place code is the evidence on a grid of CELLS x CELLS


class Evidence(NamedTuple):
    """What the detector makes of a batch; L labels, H x W places of the finest grid that it reads, M its width."""

    scores: Tensor  # (B, L, H, W): for each label, of any size
    attention: Tensor  # (B, L, H, W): the scores' softmax, the share of each place in the logit
    logits: Tensor  # (B, L)
    attended: Tensor  # (B, L, M): what stands where the label is attended to
    words: Tensor  # (B, L, W): logits of the words that describe it


class Detector(nn.Module):
    """Evidence of `num_labels` labels from several stages of an encoder, `widths` their channels, fine to coarse.

    Keys and values are sums over the stages, each normalized, projected to `width` and enlarged to the finest grid, so
    that a place knows its own texture and its surroundings. With q the query of a label, made of the embedding of its
    name, and k the key of a place:

        score = q k / sqrt(width),   logit = gain (log mean exp score) + bias,   attention = softmax(score).

    The attention is the gradient of the logit with respect to the scores, up to the gain: the map that is shown is the
    map that is used. The same formula on each of CELLS x CELLS parts of the image says how probable the finding is in
    that part. From these and the attention of each part (where) and from what was attended to (what) a small network
    reads the words that describe a finding, the same for all labels.

    Projecting and enlarging are linear, so both are done to a few queries and attention maps instead of to all places:
    neither keys nor values are ever formed, which costs a tenth.
    """

    def __init__(self, widths: Sequence[int], name_dim: int, num_labels: int, num_words: int, width: int = 128):
        super().__init__()
        self.width = width
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in widths)
        self.keys = nn.ModuleList(nn.Linear(channels, width, bias=False) for channels in widths)
        self.values = nn.ModuleList(nn.Linear(channels, width, bias=False) for channels in widths)
        self.key_place = nn.Linear(width, width, bias=False)
        self.names = nn.Parameter(torch.randn(num_labels, name_dim))
        self.query = nn.Sequential(nn.LayerNorm(name_dim), nn.Linear(name_dim, width))
        self.gain = nn.Parameter(torch.zeros(num_labels))
        self.bias = nn.Parameter(torch.full((num_labels,), -2.0))
        self.norm = nn.LayerNorm(width)
        read = 2 * CELLS**2 + 2 * width  # numbers: evidence and attention by part, what is attended to, the query
        self.describe = nn.Sequential(nn.Linear(read, width), nn.GELU(), nn.Linear(width, num_words))

    def forward(self, maps: Sequence[Tensor]) -> Evidence:
        """Stages (B, H, W, C), fine to coarse."""
        grids = [(stage.shape[1], stage.shape[2]) for stage in maps]
        tokens = [norm(stage.flatten(1, 2)) for norm, stage in zip(self.norms, maps, strict=True)]  # (B, N, C) each
        queries = self.query(self.names) / math.sqrt(self.width)  # (L, M)
        scores = queries @ self.key_place(places(grids[0], self.width, queries.device)).mT  # (L, N) of the finest grid
        for grid, stage, key in zip(grids, tokens, self.keys, strict=True):
            of_stage = (queries @ key.weight) @ stage.mT  # (B, L, N of the stage)
            scores = scores + of_stage @ enlarging(grid, grids[0], stage.device).to(of_stage)
        attention = scores.softmax(-1)  # (B, L, N)
        attended = torch.zeros_like(queries)
        for grid, stage, value in zip(grids, tokens, self.values, strict=True):
            shares = attention @ enlarging(grid, grids[0], stage.device).to(attention).mT  # (B, L, N of the stage)
            attended = attended + value(shares @ stage.to(shares))  # (B, L, M)
        attended = self.norm(attended)
        logits = self._logits(scores.logsumexp(-1) - math.log(scores.shape[-1]))
        scores, attention = scores.unflatten(-1, grids[0]), attention.unflatten(-1, grids[0])
        shares = adaptive_avg_pool2d(attention, CELLS).flatten(2)  # (B, L, CELLS * CELLS)
        shares = shares / shares.sum(-1, keepdim=True)
        about = torch.cat([self._cells(scores), shares, attended, queries.expand_as(attended)], -1)
        return Evidence(scores, attention, logits, attended, self.describe(about))

    def _logits(self, pooled: Tensor) -> Tensor:
        """Log of the mean exponentiated score (B, L) -> logit (B, L)."""
        return self.gain.exp() * pooled + self.bias

    def _cells(self, scores: Tensor) -> Tensor:
        """(B, L, H, W) -> (B, L, CELLS * CELLS): the probability of each label in each part of the image."""
        highest = scores.amax((-1, -2), keepdim=True)
        mean = adaptive_avg_pool2d((scores - highest).exp(), CELLS)  # (B, L, CELLS, CELLS)
        pooled = (mean.clamp(min=1e-12).log() + highest).flatten(2)  # (B, L, CELLS * CELLS)
        return self._logits(pooled.mT).mT.sigmoid()


# Both are kept between calls and must do for training, whoever asks first.


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def enlarging(grid: tuple[int, int], finer: tuple[int, int], device: torch.device) -> Tensor:
    """(N, N of the finer grid): the matrix that enlarges maps, bilinearly."""
    each = torch.eye(grid[0] * grid[1], device=device).unflatten(-1, grid)[:, None]  # (N, 1, H, W)
    return interpolate(each, finer, mode="bilinear", align_corners=False).flatten(1)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def places(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(N, M): the code of every place."""
    return sine_positions(grid, width).to(device)
