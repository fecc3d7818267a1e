"""What is learned: prompts about a study's image with their answers, and the label states behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lightmedvlm_utils.model.processing import Processor
from lightmedvlm_utils.observations import LABELS


@dataclass
class Example:
    """One thing to learn: a prompt about a study's image, and its answer."""

    study_id: int
    prompt: str
    target: str
    states: np.ndarray | None  # (14,) label states: 1, 0, -1 or NaN; None where nobody labelled the study


def report_examples(studies: pd.DataFrame, processor: Processor) -> list[Example]:
    """One example a study: the report prompt and the clean report."""
    states = studies[list(LABELS)].to_numpy(dtype=float)
    return [
        Example(int(study_id), processor.report_prompt(views), report, row)
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


def disease_targets(states: np.ndarray | None) -> Tensor:
    """Label states (14,) -> probabilities: present 1, uncertain 0.5, absent or not mentioned 0; NaN without states."""
    if states is None:
        return torch.full((len(LABELS),), torch.nan)
    return torch.tensor(np.select([states == 1, states == -1], [1.0, 0.5], 0.0), dtype=torch.float32)
