"""The baseline: a plain projector, the same two linear layers for every image token."""

from __future__ import annotations

from torch import Tensor, nn

from lightmedvlm_utils.model.connectors.labelled import LabelledConnector


class MLPConnector(LabelledConnector):
    """Every place stays, and every place is alone: Q = N (Liu et al. 2023, LLaVA-1.5, arXiv 2310.03744).

    - `output_scale`: factor on the normalized tokens;
    - `labels`: whether it has a head that learns the 14 labels from its tokens.
    """

    title = "plain projector"

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        dropout: float = 0.1,
        output_scale: float = 1.0,
        labels: bool = False,
    ):
        super().__init__()
        self.num_output_tokens, self.output_scale = grid[0] * grid[1], output_scale
        self.hidden = nn.Linear(vision_dim, 2 * vision_dim)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(2 * vision_dim, llm_dim)
        self.norm = nn.LayerNorm(llm_dim)
        if labels:
            self.add_label_head(llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D)."""
        hidden = self.dropout(nn.functional.gelu(self.hidden(features)))  # (B, N, 2C)
        return self.norm(self.project(hidden)) * self.output_scale  # (B, N, D)
