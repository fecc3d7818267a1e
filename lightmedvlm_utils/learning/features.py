"""Where a stage takes its images from: the encoder's tokens, computed once where it is frozen, or the files.

Then an epoch costs only the connector and the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightmedvlm_utils.files import atomic_path
from lightmedvlm_utils.inference import Reporter
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import Processor

FEATURES = "features.safetensors"  # notebook 03's file of them


class FeatureStore:
    """Encoder tokens (N, C) by study, in half precision: 3,000 studies of 49 x 192 take 56 MB."""

    def __init__(self, study_ids: Sequence[int], features: Tensor):
        self.features = features
        self.row = {int(study_id): row for row, study_id in enumerate(study_ids)}

    def __len__(self) -> int:
        return len(self.row)

    def __call__(self, study_ids: Sequence[int]) -> dict[str, Tensor]:
        """`image_features` (B, N, C) of these studies."""
        rows = [self.row[int(study_id)] for study_id in study_ids]
        return {"image_features": self.features[rows].float()}

    def joined(self, other: FeatureStore) -> FeatureStore:
        """Both stores' studies in one."""
        return FeatureStore([*self.row, *other.row], torch.cat([self.features, other.features]))

    def save(self, path: Path) -> None:
        ids = torch.tensor(list(self.row))
        with atomic_path(path) as temporary:
            save_file({"study_ids": ids, "features": self.features}, temporary)

    @classmethod
    def load(cls, path: Path) -> FeatureStore:
        saved = load_file(path)
        return cls(saved["study_ids"].tolist(), saved["features"])


class ImageStore:
    """The images of studies, read and transformed when asked for: used where the encoder learns too."""

    def __init__(self, studies: pd.DataFrame, processor: Processor):
        self.paths: dict[int, list[str]] = {}
        self.processor = processor
        self.add(studies)

    def add(self, studies: pd.DataFrame) -> None:
        """Know the images of these studies too."""
        for study_id, images in zip(studies.study_id, studies.images, strict=True):
            self.paths[int(study_id)] = [image["path"] for image in images]

    def __call__(self, study_ids: Sequence[int]) -> dict[str, Tensor]:
        """`pixel_values` (B, V, 3, S, S) and `view_mask` (B, V) of these studies."""
        return self.processor.images([self.paths[int(study_id)] for study_id in study_ids])


Store = FeatureStore | ImageStore


def encode_studies(
    model: LightMedVLM, processor: Processor, studies: pd.DataFrame, batch_size: int = 64
) -> FeatureStore:
    """Run the frozen encoder over every study once, and therefore in full precision.

    Raises UserError for a model that takes views side by side: then a study has no one set of tokens.
    """
    reporter = Reporter(model, processor, "float32", batch_size)
    views = [[image["path"] for image in images] for images in studies.images]
    return FeatureStore(studies.study_id, torch.cat([tokens.half() for tokens in reporter.encoded(views)]))
