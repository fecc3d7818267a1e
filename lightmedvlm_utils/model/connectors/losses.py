"""What a connector can learn of the findings before and beside the text: losses against what is known of a study.

Letters as in `base.py`: B batch, Q tokens, D language-model width, W describing words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lightmedvlm_utils.data.descriptions import group_slices
from lightmedvlm_utils.model.connectors.base import Known
from lightmedvlm_utils.model.connectors.evidence import Evidence
from lightmedvlm_utils.observations import LABELS

STATES = ("absent", "possible", "present")
POSITIVE_WEIGHT = 3.0  # in the disease loss, since a finding is absent in nine studies of ten
WORD_WEIGHT = 0.03  # in the disease loss: more, and evidence is laid where words are read easily
ONE_OF = ("side", "zone", "grade")  # groups of which a finding has one word


def token_logits(tokens: Tensor, state_words: Tensor) -> Tensor:
    """Tokens (B, Q, D), the first 14 of them the labels' -> (B, 14), by the words for their states (14, 3, D)."""
    absent, _, present = state_words.unbind(1)  # (14, D) each
    line = present - absent
    place = ((tokens[:, : len(LABELS)] - absent) * line).sum(-1) / line.square().sum(-1)  # (B, 14): 0 to 1
    return 3 * (2 * place - 1)


def token_loss(tokens: Tensor, targets: Tensor, words: Tensor) -> Tensor:
    """Squared distance of each label's token from the words (14, 3, D) for its state.

    `targets` (B, 14) is 1 for present, 0.5 for possible, 0 for absent, NaN for unknown. A distance of 1 is that
    between "absent" and "present". The best token under this loss is the mean of the words, weighted by how
    probable their states are: where the image leaves doubt, the token stands between them.
    """
    known = ~targets.isnan()
    state = (2 * targets.nan_to_num()).round().long()  # (B, 14): index into STATES
    wanted = words[torch.arange(len(LABELS), device=state.device), state]  # (B, 14, D)
    unit = (words[:, 2] - words[:, 0]).square().sum(-1)  # (14,)
    distance = (tokens[:, : len(LABELS)] - wanted).square().sum(-1) / unit  # (B, 14)
    weight = torch.where(state > 0, POSITIVE_WEIGHT, 1.0)
    return (distance * weight)[known].sum() / known.sum().clamp(min=1)  # a batch may be all unknown


def detection_loss(found: Evidence, known: Known, mask_loss: float) -> Tensor:
    """The cross-entropy of the labels' states, WORD_WEIGHT times that of the words that describe those present, and
    where masks are known `mask_loss` times -log of the share of a finding's attention inside its mask."""
    described = known.states.nan_to_num() > 0
    word_loss = _word_loss(found.words[described], known.words[described].to(found.words))
    loss = state_loss(found.logits, known.states) + WORD_WEIGHT * word_loss
    if mask_loss and known.masks is not None:
        loss = loss + mask_loss * _outside_loss(found.attention, known.masks)
    return loss


def state_loss(logits: Tensor, states: Tensor) -> Tensor:
    """Cross-entropy of logits (B, 14) with states in 0 to 1, mean over the known; findings weigh POSITIVE_WEIGHT."""
    is_known, targets = ~states.isnan(), states.nan_to_num()
    weight = torch.where(targets > 0, POSITIVE_WEIGHT, 1.0)
    loss = binary_cross_entropy_with_logits(logits, targets, weight, reduction="none")  # (B, 14)
    return loss[is_known].sum() / is_known.sum().clamp(min=1)  # a batch may be all unknown


def _word_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """(F, W) of the findings that are present: in each group of one word the cross-entropy of that word, or of none; of
    the kinds, the binary ones. Mean over the findings."""
    loss = logits.new_zeros(())
    for name, part in group_slices().items():
        of_group, said = logits[:, part], wanted[:, part]
        if name in ONE_OF:
            unsaid = 1 - said.sum(-1, keepdim=True)
            loss = loss - (with_none(of_group).log_softmax(-1) * torch.cat([said, unsaid], -1)).sum()
        else:
            loss = loss + binary_cross_entropy_with_logits(of_group, said, reduction="sum")
    return loss / max(1, len(logits))


def _outside_loss(attention: Tensor, masks: Tensor) -> Tensor:
    """-log of the attention (B, 14, H, W) inside the masks (B, 14, h, w), mean over the masks that are not empty."""
    inside = nn.functional.adaptive_max_pool2d(masks.to(attention), attention.shape[-2:])  # (B, 14, H, W)
    share = (attention * inside).sum((-1, -2))[masks.any(-1).any(-1)]
    return -share.clamp(min=1e-6).log().mean() if len(share) else attention.new_zeros(())


def with_none(logits: Tensor) -> Tensor:
    """One more choice behind the words of a group: none of them."""
    return nn.functional.pad(logits, (0, 1))
