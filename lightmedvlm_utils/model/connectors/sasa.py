"""SASA, the Spatially-Aware Semantic Abstractor of the thesis: convolutions, then queries that start from diseases.

The convolutional stage follows Honeybee's C-Abstractor (Cha et al. 2024, arXiv 2312.06742) in idea, the query
stage follows cross-attention resamplers (Alayrac et al. 2022, arXiv 2204.14198). With `evidence` the disease queries
attend by what they find (`evidence.py`), and say it in words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightmedvlm_utils.data.descriptions import WORDS, group_slices
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model.connectors.base import (
    Connector,
    Features,
    Known,
    Words,
    check_choice,
    check_heads,
    sine_positions,
)
from lightmedvlm_utils.model.connectors.evidence import Detector, Evidence
from lightmedvlm_utils.model.connectors.losses import (
    ONE_OF,
    STATES,
    detection_loss,
    token_logits,
    token_loss,
    with_none,
)
from lightmedvlm_utils.observations import LABELS

UNTOLD_WORDS = 0.3  # of the known findings in training: their states are told, their words as the detector found them
SHARPNESS = 4.0  # of what a token says: it leaves in doubt what is close to even, and decides the rest


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
      per-finding probabilities; it has no weights of its own;
    - `evidence`: from how many stages of the encoder a `Detector` reads evidence for the 14 labels, place by place; 0
      for none. It takes the disease queries' place, and the queries above ask what is beyond the labels. The token of a
      label is then what the detector found, in the language model's words: the label's state, and as far as it is
      present how it is described (side, zone, grade, kind), and a residue that no word holds;
    - `mask_loss`: weight of the share of a finding's attention that falls outside its mask, where masks are known.

    Raises UserError for unknown values and for fewer queries than diseases.
    """

    title = "SASA"
    has_attention_maps = True
    token_labels = LABELS
    positions: Tensor
    state_words: Tensor  # (14, 3, D); only with a disease head
    description_words: Tensor  # (W, D); only with a detector
    detector: Detector | None

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
        evidence: int = 0,
        mask_loss: float = 0.3,
    ):
        super().__init__()
        check_choice("residual", residual, ("raw", "normed"))
        check_choice("conv_norm", conv_norm, ("batch", "group"))
        check_choice("query_start", query_start, ("diseases", "random"))
        check_heads(llm_dim, num_heads)
        least = len(LABELS) + 1 if evidence else len(LABELS)
        if num_queries < least and (disease_head or query_start == "diseases"):
            raise UserError(f"This SASA needs num_queries >= {least}, one per label; {num_queries} was given.")
        if evidence and not disease_head:
            raise UserError("SASA's evidence is told in words for the labels' states; leave disease_head on with it.")
        self.grid, self.num_output_tokens, self.residual = tuple(grid), num_queries, residual
        self.match_query_scale, self.output_scale, self.query_start = match_query_scale, output_scale, query_start
        self.refine = _refinement(vision_dim, conv_norm) if conv else nn.Identity()
        self.project = nn.Linear(vision_dim, llm_dim)
        positions = sine_positions(grid, llm_dim) if key_positions else torch.zeros(1)
        self.register_buffer("positions", positions, persistent=False)
        self.queries = nn.Parameter(torch.randn(num_queries - (len(LABELS) if evidence else 0), llm_dim))
        self.norm_queries = nn.LayerNorm(llm_dim)
        self.norm_keys = nn.LayerNorm(llm_dim)
        self.attention = nn.MultiheadAttention(llm_dim, num_heads, dropout, batch_first=True)
        self.norm_attended = nn.LayerNorm(llm_dim)
        self.mlp = nn.Sequential(nn.Linear(llm_dim, 4 * llm_dim), nn.GELU(), nn.Linear(4 * llm_dim, llm_dim))
        self.norm = nn.LayerNorm(llm_dim)
        self.has_disease_head = disease_head
        if disease_head:
            self.register_buffer("state_words", torch.zeros(len(LABELS), len(STATES), llm_dim))
        if evidence:
            self.num_stages = evidence
            widths = [vision_dim // 2**halvings for halvings in reversed(range(evidence))]  # of a Swin
            self.detector = Detector(widths, llm_dim, len(LABELS), len(WORDS))
            self.mask_loss = mask_loss
            self.register_buffer("description_words", torch.zeros(len(WORDS), llm_dim))
            width = self.detector.width
            self.residue = nn.Sequential(nn.Linear(width, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))

    def forward(self, features: Features, known: Known | None = None) -> Tensor:
        """(B, N, C), or with evidence several stages -> (B, Q, D)."""
        tokens = self._attend(self._last(features))[0]
        if self.detector is None:
            return tokens
        return torch.cat([self._disease_tokens(self.detector(features), known), tokens], 1)

    def attention_maps(self, features: Features) -> Tensor:
        """(B, Q, H, W): where each query looks, mean over the heads; each map sums to 1."""
        weights = self._attend(self._last(features), need_weights=True)[1]  # (B, Q, N)
        assert weights is not None  # they were asked for
        maps = weights.unflatten(-1, self.grid)  # (B, Q, H, W)
        if self.detector is None:
            return maps
        found = self.detector(features).attention  # (B, 14, H, W), on a finer grid
        maps = interpolate(maps, found.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([found, maps / maps.sum((-1, -2), keepdim=True)], 1)

    def disease_logits(self, features: Features) -> Tensor:
        """(B, 14): the logit that label i is present, read from query i alone: the detector's, or else the token's
        place on the line from the words for "absent" (logit -3) to those for "present" (3)."""
        if self.detector is not None:
            return self.detector(features).logits
        return token_logits(self(features), self._state_words())

    def disease_loss(self, features: Features, known: Known) -> Tensor:
        """The detector's loss or, without one, that of the tokens (`token_loss`)."""
        if self.detector is not None:
            return detection_loss(self.detector(features), known, self.mask_loss)
        return token_loss(self(features), known.states, self._state_words())

    def _state_words(self) -> Tensor:
        if not self.has_disease_head:
            raise self._no_disease_head()
        return self.state_words

    @torch.no_grad()
    def start_from_words(self, words: Words) -> None:
        """Start from the language model's own words: overwrite the disease queries with the labels' names, and scale
        the others, each as far as the options say; keep the words for states and descriptions."""
        if self.has_disease_head:
            self.state_words.copy_(words.states)
        if self.match_query_scale:
            self.queries.mul_(words.names.std() / self.queries.std())
        if self.detector is not None:
            self.description_words.copy_(words.descriptions)
        if self.detector is not None and self.query_start == "diseases":
            self.detector.names.copy_(words.names)
        elif self.query_start == "diseases":
            self.queries[: len(LABELS)] = words.names.to(self.queries)

    def _last(self, features: Features) -> Tensor:
        return features[-1].flatten(1, 2) if isinstance(features, tuple) else features

    def _disease_tokens(self, found: Evidence, known: Known | None) -> Tensor:
        """What was found, or where it is known what is there, in the language model's words: (B, 14, D)."""
        present = (SHARPNESS * found.logits).sigmoid()  # (B, 14)
        said = word_shares(SHARPNESS * found.words)  # (B, 14, W)
        if known is not None:
            unknown = known.states.isnan()
            present = torch.where(unknown, present, known.states)
            told = torch.rand_like(present) >= UNTOLD_WORDS if self.training else torch.ones_like(unknown)
            said = torch.where((told & ~unknown)[..., None], known.words.to(said), said)
        absent, possible, certain = self._state_words().unbind(1)  # (14, D) each
        doubt, belief = (2 * present).clamp(max=1)[..., None], (2 * present - 1).clamp(min=0)[..., None]
        state = absent + doubt * (possible - absent) + belief * (certain - possible)
        residue = self.output_scale * self.residue(found.attended)
        return state + present[..., None] * (said @ self.description_words + residue)

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


def word_shares(logits: Tensor) -> Tensor:
    """(..., W) -> the same shape: how far each word is said; in a group of one word the words and none share 1."""
    shares = [
        with_none(logits[..., part]).softmax(-1)[..., :-1] if name in ONE_OF else logits[..., part].sigmoid()
        for name, part in group_slices().items()
    ]
    return torch.cat(shares, -1)


def _refinement(width: int, norm: str) -> nn.Sequential:
    def make_norm() -> nn.Module:
        return nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(math.gcd(32, width), width)

    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1), make_norm(), nn.SiLU()]
    return nn.Sequential(*layers)
