"""SASA, the Spatially-Aware Semantic Abstractor of the thesis: convolutions, then queries that start from diseases.

The convolutional stage follows Honeybee's C-Abstractor (Cha et al. 2024, arXiv 2312.06742) in idea, the query
stage follows cross-attention resamplers (Alayrac et al. 2022, arXiv 2204.14198).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model.connectors.base import Connector, check_choice, check_heads, sine_positions
from lightmedvlm_utils.observations import LABELS

STATES = ("absent", "possible", "present")
POSITIVE_WEIGHT = 3.0  # in the disease loss, since a finding is absent in nine studies of ten


class SASA(Connector):
    """Spatially-Aware Semantic Abstractor: convolutional refinement, then cross-attention from disease queries.

    The defaults are the thesis' configuration, but for `disease_head`, which it has not. Options:

    - `num_queries`: how many tokens the language model gets;
    - `query_start`: the first 14 queries start from the `"diseases"`' names, or are `"random"` like the others;
    - `conv`: whether the two 3x3 convolutions refine the map first;
    - `conv_norm`: `"batch"` as in the thesis, `"group"` for small batches, whose statistics BatchNorm would take;
    - `key_positions`: add a fixed two-dimensional sine code to the attention keys, so that a query can tell
      left from right by itself instead of by what the convolutions' borders leak;
    - `residual`: `"raw"` adds the queries themselves to what they attended to (report stages of the thesis),
      `"normed"` their LayerNorm (its VQA stage);
    - `match_query_scale`: give the free queries the scale of word embeddings, as the disease queries have it;
    - `output_scale`: factor on the normalized tokens; word embeddings are far smaller than a LayerNorm's output;
    - `disease_head`: query i's token can be held against the words for label i being absent, possible and present,
      as the language model embeds them (`state_words`). That is what the disease loss trains and what gives
      per-finding probabilities; it has no weights of its own.

    Raises UserError for unknown values and for fewer queries than diseases.
    """

    title = "SASA"
    has_attention_maps = True
    token_labels = LABELS
    positions: Tensor
    state_words: Tensor  # (14, 3, D); only with a disease head

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        num_queries: int = 64,
        num_heads: int = 8,
        dropout: float = 0.1,
        conv: bool = True,
        conv_norm: str = "batch",
        key_positions: bool = False,
        residual: str = "raw",
        match_query_scale: bool = False,
        output_scale: float = 1.0,
        query_start: str = "diseases",
        disease_head: bool = True,
    ):
        super().__init__()
        check_choice("residual", residual, ("raw", "normed"))
        check_choice("conv_norm", conv_norm, ("batch", "group"))
        check_choice("query_start", query_start, ("diseases", "random"))
        check_heads(llm_dim, num_heads)
        if num_queries < len(LABELS) and (disease_head or query_start == "diseases"):
            raise UserError(f"SASA needs num_queries >= {len(LABELS)}, one per label; {num_queries} was given.")
        self.grid, self.num_output_tokens, self.residual = tuple(grid), num_queries, residual
        self.match_query_scale, self.output_scale, self.query_start = match_query_scale, output_scale, query_start
        self.refine = _refinement(vision_dim, conv_norm) if conv else nn.Identity()
        self.project = nn.Linear(vision_dim, llm_dim)
        positions = sine_positions(grid, llm_dim) if key_positions else torch.zeros(1)
        self.register_buffer("positions", positions, persistent=False)
        self.queries = nn.Parameter(torch.randn(num_queries, llm_dim))
        self.norm_queries = nn.LayerNorm(llm_dim)
        self.norm_keys = nn.LayerNorm(llm_dim)
        self.attention = nn.MultiheadAttention(llm_dim, num_heads, dropout, batch_first=True)
        self.norm_attended = nn.LayerNorm(llm_dim)
        self.mlp = nn.Sequential(nn.Linear(llm_dim, 4 * llm_dim), nn.GELU(), nn.Linear(4 * llm_dim, llm_dim))
        self.norm = nn.LayerNorm(llm_dim)
        self.has_disease_head = disease_head
        if disease_head:
            self.register_buffer("state_words", torch.zeros(len(LABELS), len(STATES), llm_dim))

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, C) -> (B, Q, D)."""
        return self._attend(features)[0]

    def attention_maps(self, features: Tensor) -> Tensor:
        """(B, N, C) -> (B, Q, H, W): where each query looks, mean over the heads; each map sums to 1."""
        weights = self._attend(features, need_weights=True)[1]  # (B, Q, N)
        assert weights is not None  # they were asked for
        return weights.unflatten(-1, self.grid)  # (B, Q, H, W)

    def disease_logits(self, tokens: Tensor) -> Tensor:
        """Connector output (B, Q, D) -> (B, 14): the logit that label i is present, read from query i alone.

        It is the token's place on the line from the words for "absent" (logit -3) to those for "present" (3).
        """
        absent, _, present = self._state_words().unbind(1)  # (14, D) each
        line = present - absent
        place = ((tokens[:, : len(LABELS)] - absent) * line).sum(-1) / line.square().sum(-1)  # (B, 14): 0 to 1
        return 3 * (2 * place - 1)

    def disease_loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Squared distance of each disease query's token (B, Q, D) from the words for its label's state.

        `targets` (B, 14) is 1 for present, 0.5 for possible, 0 for absent, NaN for unknown. A distance of 1 is that
        between "absent" and "present". The best token under this loss is the mean of the words, weighted by how
        probable their states are: where the image leaves doubt, the token stands between them.
        """
        words = self._state_words()
        known = ~targets.isnan()
        state = (2 * targets.nan_to_num()).round().long()  # (B, 14): index into STATES
        wanted = words[torch.arange(len(LABELS), device=state.device), state]  # (B, 14, D)
        unit = (words[:, 2] - words[:, 0]).square().sum(-1)  # (14,)
        distance = (tokens[:, : len(LABELS)] - wanted).square().sum(-1) / unit  # (B, 14)
        weight = torch.where(state > 0, POSITIVE_WEIGHT, 1.0)
        return (distance * weight)[known].sum() / known.sum().clamp(min=1)  # a batch may be all unknown

    def _state_words(self) -> Tensor:
        if not self.has_disease_head:
            raise self._no_disease_head()
        return self.state_words

    @torch.no_grad()
    def start_from_words(self, disease_embeddings: Tensor, state_words: Tensor) -> None:
        """Start from the language model's own words: overwrite the first 14 queries with `disease_embeddings`
        (14, D), the labels' names, and scale the others, each as far as the options say; keep `state_words`
        (14, 3, D), the labels in each of `STATES`, for the disease head."""
        if self.has_disease_head:
            self.state_words.copy_(state_words)
        if self.match_query_scale:
            self.queries.mul_(disease_embeddings.std() / self.queries.std())
        if self.query_start == "diseases":
            self.queries[: len(LABELS)] = disease_embeddings.to(self.queries)

    def _attend(self, features: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        maps = features.transpose(1, 2).unflatten(-1, self.grid)  # (B, C, H, W)
        visual = self.project(self.refine(maps).flatten(2).transpose(1, 2))  # (B, N, D)
        keys = self.norm_keys(visual + self.positions)  # (B, N, D)
        queries = self.queries.expand(len(features), -1, -1)  # (B, Q, D)
        normed = self.norm_queries(queries)
        attended, weights = self.attention(normed, keys, keys, need_weights=need_weights)  # (B, Q, D)
        start = queries if self.residual == "raw" else normed
        tokens = self.norm_attended(start + attended)
        return self.norm(tokens + self.mlp(tokens)) * self.output_scale, weights


def _refinement(width: int, norm: str) -> nn.Sequential:
    def make_norm() -> nn.Module:
        return nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(math.gcd(32, width), width)

    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1), make_norm(), nn.SiLU()]
    return nn.Sequential(*layers)
