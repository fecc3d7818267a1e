"""What every connector is, and what the rest of the system may ask of it.

Letters in this folder: B batch, N image tokens (H x W of them), Q output tokens, C vision width, D language-model
width, W words that describe a finding (`data.descriptions.WORDS`).
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightmedvlm_utils.errors import UserError

Features = Tensor | tuple[Tensor, ...]
"""What a connector reads: the encoder's tokens (B, N, C), or the outputs (B, H, W, C) of several stages, fine to
coarse."""


class Known(NamedTuple):
    """What is known of the findings of B images: from their reports where a model learns, else nothing."""

    states: Tensor  # (B, 14): 1 present, 0.5 possible, 0 absent, NaN unknown
    words: Tensor  # (B, 14, W): the words that describe each, as `data.descriptions.describe` gives them
    masks: Tensor | None = None  # (B, 14, h, w) bool: where each is; a mask without any place is unknown


class Words(NamedTuple):
    """The language model's own words, from which a new connector may start."""

    names: Tensor  # (14, D): the labels' names
    states: Tensor  # (14, 3, D): the labels in each of STATES
    descriptions: Tensor  # (W, D): the words that describe a finding


class Connector(nn.Module):
    """Image tokens to language-model tokens: (B, N, C) -> (B, Q, D).

    A connector of your own is a subclass with `__init__(vision_dim, llm_dim, grid, ...)` that sets
    `num_output_tokens`, and `forward(features)`. Its further keyword arguments are its options; `num_queries` and
    `output_scale` get the profile's values where it has them. What it cannot do it leaves to this class, which says so.

    One that sets `num_stages` is given the outputs of so many stages of the encoder, a tuple. One with a `detector` is
    called as `forward(features, known)`: what is known it need not tell from the image.
    """

    title: ClassVar[str] = ""  # its name in tables and figures; empty: the name it is registered by
    num_output_tokens: int  # Q
    num_stages: int = 0  # how many stages of the encoder it reads, counted from its end; 0: the encoder's tokens
    has_disease_head: bool = False  # whether it can be supervised by labels and read as labels
    has_attention_maps: bool = False  # whether it can say where each of its tokens looks
    token_labels: tuple[str, ...] = ()  # the labels that its first tokens stand for

    def __init__(self) -> None:
        super().__init__()
        self.detector: nn.Module | None = None  # a part that learns the findings by itself, before the rest

    def start_from_words(self, words: Words) -> None:
        """Begin from the language model's own words. Called once for a new model; most have no use for it."""

    def attention_maps(self, features: Features) -> Tensor:
        """(B, Q, H, W): where each token looks; each map sums to 1. UserError where there are none."""
        raise UserError(f"The connector {type(self).__name__} has no attention maps; SASA has them.")

    def disease_logits(self, features: Features) -> Tensor:
        """(B, 14): the logit of each label. UserError without a disease head."""
        raise self._no_disease_head()

    def disease_loss(self, features: Features, known: Known) -> Tensor:
        """Scalar loss against what is known. UserError without a disease head."""
        raise self._no_disease_head()

    def _no_disease_head(self) -> UserError:
        return UserError(
            f"This {type(self).__name__} has no disease head (nor has an imported thesis checkpoint); take a SASA of "
            "the course for probabilities of findings."
        )


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """(H*W, width): the first half of the channels codes the row, the second the column, each as in Vaswani et
    al. 2017 but with base 100, since a grid has tens of places, not thousands."""
    quarter = width // 4
    rates = torch.exp(torch.arange(quarter) * (-math.log(100.0) / quarter))

    def code(count: int) -> Tensor:
        angles = torch.arange(count)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], -1)  # (count, 2 * quarter)

    table = torch.zeros(*grid, width)
    table[..., : 2 * quarter] = code(grid[0])[:, None]
    table[..., 2 * quarter : 4 * quarter] = code(grid[1])
    return table.flatten(0, 1)


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises UserError where an option's value is none of the choices."""
    if value not in choices:
        raise UserError(f"A connector's {option} is {' or '.join(map(repr, choices))}, not {value!r}; correct it.")


def check_heads(llm_dim: int, num_heads: int) -> None:
    """Raises UserError where attention cannot split its channels among its heads."""
    if num_heads < 1 or llm_dim % num_heads:
        raise UserError(f"Attention cannot split {llm_dim} channels among {num_heads} heads; choose another num_heads.")
