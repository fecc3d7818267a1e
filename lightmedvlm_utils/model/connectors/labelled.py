"""Supervision by labels for connectors whose tokens stand for no label, so that they can be compared with SASA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightmedvlm_utils.model.connectors.base import Connector, Features, Known
from lightmedvlm_utils.model.connectors.losses import state_loss
from lightmedvlm_utils.observations import LABELS


class LabelledConnector(Connector):
    """A connector from whose tokens a linear head can read the 14 labels (`add_label_head`): what the head is taught,
    the tokens must tell."""

    output_scale: float

    def __init__(self) -> None:
        super().__init__()
        self.label_head: nn.Linear | None = None

    def add_label_head(self, width: int) -> None:
        """Tokens of `width` channels are read by their mean and maximum, without the scale that words have."""
        self.label_head = nn.Linear(2 * width, len(LABELS))
        self.has_disease_head = True

    def disease_logits(self, features: Features) -> Tensor:
        if self.label_head is None:
            raise self._no_disease_head()
        tokens = self(features) / self.output_scale  # (B, Q, D)
        return self.label_head(torch.cat([tokens.mean(1), tokens.amax(1)], -1))  # (B, 14)

    def disease_loss(self, features: Features, known: Known) -> Tensor:
        """The loss of the labels' states, as SASA's detector has it."""
        return state_loss(self.disease_logits(features), known.states)
