"""Honeybee's C-Abstractor: convolutions, adaptive pooling to a smaller grid, convolutions, projection.

After Cha et al. 2024, *Honeybee: Locality-enhanced Projector for Multimodal LLM*, arXiv 2312.06742; the bottleneck
block is that of RegNet (Radosavovic et al. 2020, arXiv 2003.13678) with depthwise convolutions.
"""

from __future__ import annotations

import math

import torch
from timm.layers import LayerNorm2d, SqueezeExcite
from torch import Tensor, nn

from lightmedvlm_utils.model.connectors.labelled import LabelledConnector


class CAbstractor(LabelledConnector):
    """Local context in any number of tokens: the pooled grid keeps their order, Q = rows x columns.

    - `num_queries`: Q; the pooled grid is the squarest that has so many cells (20 is 4 x 5);
    - `depth`: blocks before and after the pooling;
    - `output_scale`: factor on the normalized tokens;
    - `labels`: whether it has a head that learns the 14 labels from its tokens.
    """

    title = "C-Abstractor"

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        num_queries: int = 64,
        depth: int = 3,
        output_scale: float = 1.0,
        labels: bool = False,
    ):
        super().__init__()
        self.grid, self.num_output_tokens, self.output_scale = tuple(grid), num_queries, output_scale
        rows = max(r for r in range(1, math.isqrt(num_queries) + 1) if num_queries % r == 0)
        self.positions = nn.Parameter(torch.zeros(vision_dim, *grid))
        self.before = nn.Sequential(*(_Bottleneck(vision_dim) for _ in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d((rows, num_queries // rows))
        self.after = nn.Sequential(*(_Bottleneck(vision_dim) for _ in range(depth)))
        self.project = nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.SiLU(), nn.Linear(llm_dim, llm_dim))
        self.norm = nn.LayerNorm(llm_dim)
        if labels:
            self.add_label_head(llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, C) -> (B, Q, D)."""
        maps = features.transpose(1, 2).unflatten(-1, self.grid) + self.positions  # (B, C, H, W)
        pooled = self.after(self.pool(self.before(maps)))  # (B, C, rows, columns)
        return self.norm(self.project(pooled.flatten(2).transpose(1, 2))) * self.output_scale  # (B, Q, D)


class _Bottleneck(nn.Module):
    """(B, C, H, W) -> the same: 1x1, depthwise 3x3, squeeze and excitation, 1x1, beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, width, 1, bias=False), LayerNorm2d(width), nn.SiLU()),
            *(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), LayerNorm2d(width), nn.SiLU()),
            SqueezeExcite(width, rd_ratio=0.25),
            *(nn.Conv2d(width, width, 1, bias=False), LayerNorm2d(width)),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return nn.functional.silu(maps + self.layers(maps))
