"""The values that differ between a test run, a laptop and the real model; code never asks which profile it is.

Every value has a type and a range. `settings.py` checks what a user gives instead of a profile's value against them.
"""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Interval, MinLen

from lightmedvlm_utils.device import Precision
from lightmedvlm_utils.errors import no_such

NOT_FOR_CLINICAL_USE = "Not for clinical use: research and teaching software, not a medical device."
DATASETS = ("phantom", "openi", "mimic")

Count = Annotated[int, Ge(0)]
Size = Annotated[int, Ge(1)]
Rate = Annotated[float, Gt(0), Interval(le=1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Weight = Annotated[float, Interval(ge=0, le=1e6)]
Part = Literal["vision", "connector", "detector", "lora"]

# Values that say how fast to compute, not what: a result does not depend on them.
HOW = ("eval_batch_size", "save_minutes", "image_cache")


class Settings:
    """Base of frozen settings that can note which of their values are read: a result depends on those."""

    def noting(self, reads: set[str], prefix: str = "") -> Self:
        """A copy that adds the dotted name of every value that is read to `reads`."""
        noted = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Settings):
                object.__setattr__(noted, name, value.noting(reads, f"{prefix}{name}."))
        object.__setattr__(noted, "_noted", (reads, prefix))
        return noted

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        own = object.__getattribute__(self, "__dict__")
        if name in own and "_noted" in own and name != "_noted" and not isinstance(value, Settings):
            reads, prefix = own["_noted"]
            reads.add(prefix + name)
        return value


@dataclass(frozen=True)
class StageSettings(Settings):
    """One training stage. Only the parts that `learns` names move, each at its own peak rate; the language model
    learns through LoRA adapters alone. Epochs may be fractions; 0 leaves the stage out."""

    epochs: Weight
    batch_size: Size
    learns: Annotated[tuple[Part, ...], MinLen(1)] = ("connector",)
    connector_lr: Rate = 1e-4
    lora_lr: Rate = 1e-4
    vision_lr: Rate = 1e-4
    final_lr: Share = 1e-6  # where the cosine ends
    warmup: Share = 0.05  # share of the steps in which the rate rises
    weight_decay: Share = 0.01
    gradient_clip: Annotated[float, Gt(0)] = 1.0
    micro_batch: Count = 0  # examples at a time, of a batch that does not fit into memory; 0: the whole batch
    not_finite: Literal["stop", "skip"] = "stop"  # what to do about a step whose loss or gradient is not finite
    disease_loss: Weight = 0.0  # weight of the disease loss beside the text loss, where the connector has one
    disease_warmup: Count = 0  # epochs of the disease loss alone, before any text
    disease_warmup_lr: Rate = 2e-3
    disease_warmup_weight_decay: Share = 0.05
    disease_warmup_batch_size: Size = 32
    mask_share: Share = 0.0  # of the studies, whose finding masks the detector learns from beside the labels
    true_findings: bool = False  # reports are learned from their true findings, where the connector has a detector
    questions_per_study: Count = 0  # stage 3 only: questions of all kinds, on average
    synthetic_minority: bool = False  # stage 3 only: more questions about rare labels
    report_replay: Share = 0.0  # stage 3 only: reports shown again, as a share of the training studies

    def rates(self) -> dict[Part, float]:
        """Peak learning rate of every part that learns."""
        return {part: getattr(self, f"{'connector' if part == 'detector' else part}_lr") for part in self.learns}


@dataclass(frozen=True)
class Profile(Settings):
    """Everything a run needs beside its data set. Sizes in pixels, lengths in tokens."""

    name: str
    # data
    phantom_patients: Annotated[int, Ge(20)]
    phantom_size: Annotated[int, Ge(32)]
    min_cluster_size: Annotated[int, Ge(2)]
    min_samples: Size
    balance: Literal["none", "cap", "thesis", "inverse-frequency", "random"]
    # model
    vision: Annotated[str, MinLen(1)]  # "small" or "small-masked" (shipped), a timm name or a folder
    language_model: Annotated[str, MinLen(1)]  # "small" (shipped), a hub name or a folder
    image_size: Annotated[int, Ge(32)]
    max_views: Size
    num_queries: Size  # of every connector that chooses its number of tokens
    finding_boxes: str = ""  # folder of MS-CXR or Chest ImaGenome, for mask_share and for the maps of notebook 07
    connector_options: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the connector's name
    match_output_scale: bool = False  # connector tokens as large as word embeddings
    random_init: bool = False  # build the backbones at their size without weights, to rehearse a run
    plugins: tuple[str, ...] = ()  # modules that register connectors of your own
    lora_rank: Size = 8
    lora_alpha: Size = 16
    lora_dropout: Share = 0.1
    # training
    stage1: StageSettings = StageSettings(1, 8)
    stage2: StageSettings = StageSettings(1, 8, ("connector", "lora"))
    stage3: StageSettings = StageSettings(1, 8, ("connector", "lora"), connector_lr=5e-5, lora_lr=5e-5)
    max_report_tokens: Annotated[int, Ge(8)] = 100
    precision: Precision = "auto"
    image_cache: str = ""  # folder of the images resized once, where the encoder learns; "": within the run's folder
    save_minutes: Annotated[float, Gt(0)] = 10.0  # between the states from which an interrupted stage goes on
    # evaluation
    num_beams: Size = 1
    eval_batch_size: Size = 64
    eval_studies: Count = 0  # 0 = the whole test split
    bootstrap_samples: Annotated[int, Ge(2)] = 1000

    def stage(self, number: int) -> StageSettings:
        """Settings of training stage 1, 2 or 3."""
        return {1: self.stage1, 2: self.stage2, 3: self.stage3}[number]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_LAPTOP = Profile(
    name="laptop",
    phantom_patients=1900,
    phantom_size=256,
    min_cluster_size=15,
    min_samples=5,
    balance="cap",
    vision="small",
    language_model="small",
    image_size=224,
    max_views=1,
    num_queries=20,
    connector_options={"sasa": {"match_query_scale": True, "key_positions": True, "evidence": 3}},
    match_output_scale=True,
    lora_rank=16,
    lora_alpha=32,
    lora_dropout=0.0,  # drawing its random numbers took a seventh of a training step
    stage1=StageSettings(1, 16, connector_lr=1e-3, disease_loss=5.0, disease_warmup=5, true_findings=True),
    stage2=StageSettings(
        1, 16, ("connector", "lora"), connector_lr=5e-4, lora_lr=1e-3, disease_loss=5.0, true_findings=True
    ),
    stage3=StageSettings(
        epochs=1,
        batch_size=32,
        learns=("connector", "lora"),
        connector_lr=5e-4,
        lora_lr=1e-3,
        disease_loss=5.0,
        questions_per_study=4,
        synthetic_minority=True,
        report_replay=0.3,
        true_findings=True,
    ),
    max_report_tokens=128,
)

_SMOKE = replace(
    _LAPTOP,
    name="smoke",
    phantom_patients=60,
    phantom_size=128,
    min_cluster_size=4,
    min_samples=2,
    stage1=replace(_LAPTOP.stage1, batch_size=8, disease_warmup=2),
    stage2=replace(_LAPTOP.stage2, batch_size=8),
    stage3=replace(_LAPTOP.stage3, batch_size=16, questions_per_study=6),
    eval_batch_size=16,
    bootstrap_samples=100,
)

# The thesis' own recipe; SASA without the options that ours adds.
_THESIS = Profile(
    name="thesis",
    phantom_patients=1900,
    phantom_size=512,
    min_cluster_size=100,
    min_samples=10,
    balance="thesis",
    vision="swin_base_patch4_window7_224.ms_in1k",
    language_model="Qwen/Qwen3-0.6B",
    image_size=224,
    max_views=2,
    num_queries=64,
    stage1=StageSettings(1, 8, ("vision", "connector")),
    stage2=StageSettings(15, 8, ("vision", "connector", "lora")),
    stage3=StageSettings(
        epochs=25,
        batch_size=8,
        learns=("vision", "connector", "lora"),
        connector_lr=5e-5,
        lora_lr=5e-5,
        vision_lr=5e-5,
        questions_per_study=10,
        synthetic_minority=True,
    ),
    max_report_tokens=100,
    num_beams=3,
    eval_batch_size=16,
)

PROFILES = {profile.name: profile for profile in (_SMOKE, _LAPTOP, _THESIS)}


def get_profile(name: str) -> Profile:
    """The profile of that name; raises UserError for any other."""
    if name not in PROFILES:
        raise no_such("profile", name, PROFILES)
    return PROFILES[name]


def check_dataset(name: str) -> None:
    """Raises UserError where there is no data set of that name."""
    if name not in DATASETS:
        raise no_such("data set", name, DATASETS)
