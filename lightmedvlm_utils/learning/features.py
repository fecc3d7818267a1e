"""Where a stage takes its images from: the encoder's tokens, computed once where it is frozen, or the files.

Then an epoch costs only the connector and the language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightmedvlm_utils.data.images import read_image
from lightmedvlm_utils.files import atomic_path
from lightmedvlm_utils.inference import Reporter, StudyFeatures
from lightmedvlm_utils.learning.cache import ImageCache
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import Processor

FEATURES = "features.safetensors"  # notebook 03's file of them


class FeatureStore:
    """What connectors read of the encoder, by study, in half precision: the outputs (H, W, C) of its last stages, fine
    to coarse. Of 3,000 studies, three stages of the small Swin take 400 MB."""

    def __init__(self, study_ids: Iterable[int], stages: Iterable[Tensor]):
        self.stages = tuple(stages)  # each (studies, H, W, C)
        self.row = {int(study_id): row for row, study_id in enumerate(study_ids)}

    def __len__(self) -> int:
        return len(self.row)

    def __call__(self, study_ids: Sequence[int]) -> dict[str, tuple[Tensor, ...]]:
        """`image_features` of these studies: one (B, H, W, C) a stage."""
        rows = [self.row[int(study_id)] for study_id in study_ids]
        return {"image_features": tuple(stage[rows].float() for stage in self.stages)}

    def studies(self, study_ids: Iterable[int]) -> list[StudyFeatures]:
        """The features of these studies, one by one and as they are stored."""
        return [StudyFeatures(stage[self.row[int(i)]] for stage in self.stages) for i in study_ids]

    def last(self, count: int) -> FeatureStore:
        """The same studies with the last `count` stages alone."""
        return FeatureStore(self.row, self.stages[-count:])

    def joined(self, other: FeatureStore) -> FeatureStore:
        """Both stores' studies in one."""
        pairs = zip(self.stages, other.stages, strict=True)
        return FeatureStore([*self.row, *other.row], [torch.cat(pair) for pair in pairs])

    def save(self, path: Path) -> None:
        ids = torch.tensor(list(self.row))
        stages = {f"stage_{number}": stage for number, stage in enumerate(self.stages)}
        with atomic_path(path) as temporary:
            save_file({"study_ids": ids, **stages}, temporary)

    @classmethod
    def load(cls, path: Path) -> FeatureStore:
        saved = load_file(path)
        stages = [saved[f"stage_{number}"] for number in range(len(saved) - 1)]
        return cls(saved["study_ids"].tolist(), stages)


class ImageStore:
    """The images of studies, where the encoder learns too: from a cache of resized ones, or read and resized when asked
    for."""

    def __init__(self, studies: pd.DataFrame, processor: Processor, cache: ImageCache | None = None):
        self.paths: dict[int, list[str]] = {}
        self.processor, self.cache = processor, cache
        self.add(studies)

    def add(self, studies: pd.DataFrame) -> None:
        """Know the images of these studies too."""
        for study_id, images in zip(studies.study_id, studies.images, strict=True):
            self.paths[int(study_id)] = [image["path"] for image in images]

    def __call__(self, study_ids: Sequence[int]) -> dict[str, Tensor]:
        """`pixel_values` (B, V, 3, S, S) and `view_mask` (B, V) of these studies."""
        views = [self.paths[int(study_id)][: self.processor.max_views] for study_id in study_ids]
        return self.processor.stacked([[self._gray(path) for path in paths] for paths in views])

    def _gray(self, path: str) -> Tensor:
        if self.cache is not None and path in self.cache:
            return self.cache[path]
        return self.processor.gray(read_image(path))


Store = FeatureStore | ImageStore


def encode_studies(
    model: LightMedVLM, processor: Processor, studies: pd.DataFrame, batch_size: int = 64
) -> FeatureStore:
    """Run the frozen encoder over every study once, and therefore in full precision; kept is what `model`'s connector
    reads.

    Raises UserError for a model that takes views side by side: then a study has no one set of tokens.
    """
    reporter = Reporter(model, processor, "float32", batch_size)
    views = [[image["path"] for image in images] for images in studies.images]
    parts = [[stage.half() for stage in stages] for stages in reporter.encoded(views)]
    return FeatureStore(studies.study_id, [torch.cat(stage) for stage in zip(*parts, strict=True)])
