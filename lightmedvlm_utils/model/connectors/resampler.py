"""A resampler: learned queries that belong to no disease attend to the image, layer by layer.

After the Perceiver Resampler of Flamingo (Alayrac et al. 2022, arXiv 2204.14198); the Q-Former of BLIP-2 (Li et al.
2023, arXiv 2301.12597) is its relative.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightmedvlm_utils.model.connectors.base import check_heads, sine_positions
from lightmedvlm_utils.model.connectors.labelled import LabelledConnector


class Resampler(LabelledConnector):
    """Q free queries, each layer attending to the image and to each other, then thinking by themselves.

    - `num_queries`: Q; `num_layers` and `num_heads` of the attention;
    - `output_scale`: factor on the normalized tokens;
    - `labels`: whether it has a head that learns the 14 labels from its tokens.
    """

    title = "resampler"

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        num_queries: int = 64,
        num_layers: int = 2,
        num_heads: int = 8,
        dropout: float = 0.1,
        output_scale: float = 1.0,
        labels: bool = False,
    ):
        super().__init__()
        check_heads(llm_dim, num_heads)
        self.num_output_tokens, self.output_scale = num_queries, output_scale
        self.project = nn.Linear(vision_dim, llm_dim)
        self.register_buffer("positions", sine_positions(grid, llm_dim), persistent=False)
        self.queries = nn.Parameter(torch.randn(num_queries, llm_dim) * 0.02)
        self.layers = nn.ModuleList(_Layer(llm_dim, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(llm_dim)
        if labels:
            self.add_label_head(llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, C) -> (B, Q, D)."""
        image = self.project(features) + self.positions  # (B, N, D)
        queries = self.queries.expand(len(features), -1, -1)  # (B, Q, D)
        for layer in self.layers:
            queries = layer(queries, image)
        return self.norm(queries) * self.output_scale


class _Layer(nn.Module):
    """Cross-attention whose keys are the image and the queries themselves, then an MLP."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.norm_image, self.norm_queries, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, num_heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """(B, Q, D), (B, N, D) -> (B, Q, D)."""
        asking = self.norm_queries(queries)
        keys = torch.cat([self.norm_image(image), asking], 1)  # (B, N + Q, D)
        queries = queries + self.attention(asking, keys, keys, need_weights=False)[0]
        return queries + self.mlp(self.norm_mlp(queries))
