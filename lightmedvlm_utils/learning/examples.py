"""What is learned: prompts about a study's image with their answers, and the label states behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lightmedvlm_utils.data.descriptions import WORDS, describe
from lightmedvlm_utils.model.connectors.base import Known
from lightmedvlm_utils.model.processing import Processor
from lightmedvlm_utils.observations import LABELS


@dataclass
class Example:
    """One thing to learn: a prompt about a study's image, and its answer."""

    study_id: int
    prompt: str
    target: str
    states: np.ndarray | None  # (14,) label states: 1, 0, -1 or NaN; None where nobody labelled the study
    described: np.ndarray | None = None  # (14, W) as `data.descriptions.describe`; None where there is no report
    masks: np.ndarray | None = None  # (14, h, w) bool: where the findings are; None where nobody has drawn them
    told: bool = False  # whether a connector with a detector is told the findings, so that the text learns from them


def report_examples(studies: pd.DataFrame, processor: Processor, told: bool = False) -> list[Example]:
    """One example a study: the report prompt and the clean report; `told` as an Example is."""
    states = studies[list(LABELS)].to_numpy(dtype=float)
    return [
        Example(int(study_id), processor.report_prompt(views), report, row, describe(report), told=told)
        for study_id, views, report, row in zip(
            studies.study_id, num_views(studies), studies.report, states, strict=True
        )
    ]


def question_examples(questions: pd.DataFrame, studies: pd.DataFrame, processor: Processor) -> list[Example]:
    """One example a question: its prompt and its answer. `studies` may be without labels."""
    labels = studies[list(LABELS)].to_numpy(dtype=float) if set(LABELS) <= set(studies) else [None] * len(studies)
    states = dict(zip(studies.study_id, labels, strict=True))
    views = dict(zip(studies.study_id, num_views(studies), strict=True))
    return [
        Example(
            int(row.study_id),
            processor.question_prompt(row.question, views[row.study_id], getattr(row, "closed", None)),
            row.answer,
            states[row.study_id],
        )
        for row in questions.itertuples()
    ]


def num_views(studies: pd.DataFrame) -> list[int]:
    """Images of each study; 1 where the table does not list them (features computed beforehand)."""
    return [len(images) for images in studies["images"]] if "images" in studies else [1] * len(studies)


def known_of(examples: Sequence[Example]) -> Known:
    """What is known of the examples' findings: their states, the words that describe them, and where some of them
    are."""
    undescribed = np.zeros((len(LABELS), len(WORDS)), np.float32)
    words = [undescribed if example.described is None else example.described for example in examples]
    states = torch.stack([disease_targets(example.states) for example in examples])
    drawn = [example.masks for example in examples if example.masks is not None]
    masks = None
    if drawn:
        masks = np.stack([np.zeros_like(drawn[0]) if e.masks is None else e.masks for e in examples])
    return Known(states, torch.from_numpy(np.stack(words)), None if masks is None else torch.from_numpy(masks))


def disease_targets(states: np.ndarray | None) -> Tensor:
    """Label states (14,) -> probabilities: present 1, uncertain 0.5, absent or not mentioned 0; NaN without states."""
    if states is None:
        return torch.full((len(LABELS),), torch.nan)
    return torch.tensor(np.select([states == 1, states == -1], [1.0, 0.5], 0.0), dtype=torch.float32)
