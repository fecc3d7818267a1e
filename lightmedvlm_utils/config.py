"""The values that differ between a test run, a laptop and the real model; code never asks which profile it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from lightmedvlm_utils.errors import UserError

NOT_FOR_CLINICAL_USE = "Not for clinical use: research and teaching software, not a medical device."

# The 14 CheXpert observations in the order of the SASA queries (thesis; Irvin et al. 2019 for the set).
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
FINDINGS = tuple(label for label in LABELS if label != "No Finding")


@dataclass(frozen=True)
class StageSettings:
    """One training stage. Learning rates are per part; a part whose rate is 0 is frozen.

    Stage 1 freezes the language model; in stages 2 and 3 it learns through LoRA adapters.
    """

    epochs: float
    batch_size: int
    connector_lr: float
    lora_lr: float = 0.0
    vision_lr: float = 0.0
    final_lr: float = 1e-6  # where the cosine ends
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    disease_loss: float = 0.0  # weight of SASA's disease loss beside the text loss
    disease_warmup: int = 0  # epochs of the disease loss alone, before any text
    questions_per_study: int = 0  # stage 3 only: yes/no questions
    synthetic_minority: bool = False  # stage 3 only: more questions about rare labels
    report_replay: float = 0.0  # stage 3 only: reports shown again, as a share of the training studies


@dataclass(frozen=True)
class Profile:
    """Everything a run needs beside its data set. Sizes in pixels, lengths in tokens."""

    name: str
    # data
    phantom_patients: int
    phantom_size: int
    min_cluster_size: int
    min_samples: int
    balance: str
    # model
    vision: str  # "small" (shipped), a timm name or a folder
    language_model: str  # "small" (shipped), a hub name or a folder
    image_size: int
    max_views: int
    num_queries: int
    connector_options: dict = field(default_factory=dict)
    match_output_scale: bool = False  # connector tokens as large as word embeddings
    random_init: bool = False  # build real-size backbones without weights
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    # training
    stage1: StageSettings = StageSettings(1, 8, 1e-4)
    stage2: StageSettings = StageSettings(1, 8, 1e-4, 1e-4)
    stage3: StageSettings = StageSettings(1, 8, 5e-5, 5e-5)
    max_report_tokens: int = 100
    precision: str = "auto"  # "auto", "float32", "bfloat16" or "float16"
    # evaluation
    num_beams: int = 1
    eval_batch_size: int = 64
    eval_studies: int = 0  # 0 = the whole test split
    bootstrap_samples: int = 1000

    def stage(self, number: int) -> StageSettings:
        """Settings of training stage 1, 2 or 3."""
        return {1: self.stage1, 2: self.stage2, 3: self.stage3}[number]

    def to_dict(self) -> dict:
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
    connector_options={"match_query_scale": True, "key_positions": True},
    match_output_scale=True,
    lora_rank=16,
    lora_alpha=32,
    lora_dropout=0.0,  # drawing its random numbers took a seventh of a training step
    stage1=StageSettings(1, 16, 1e-3, disease_loss=5.0, disease_warmup=8),
    stage2=StageSettings(1, 16, 5e-4, 1e-3, disease_loss=5.0),
    stage3=StageSettings(
        epochs=1,
        batch_size=32,
        connector_lr=5e-4,
        lora_lr=1e-3,
        disease_loss=5.0,
        questions_per_study=4,
        synthetic_minority=True,
        report_replay=0.3,
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
    stage1=StageSettings(1, 8, 1e-4, vision_lr=1e-4),
    stage2=StageSettings(15, 8, 1e-4, 1e-4, vision_lr=1e-4),
    stage3=StageSettings(25, 8, 5e-5, 5e-5, vision_lr=5e-5, questions_per_study=10, synthetic_minority=True),
    max_report_tokens=100,
    num_beams=3,
    eval_batch_size=16,
)

PROFILES = {profile.name: profile for profile in (_SMOKE, _LAPTOP, _THESIS)}
DATASETS = ("phantom", "openi", "mimic")


def get_profile(name: str) -> Profile:
    """The profile of that name; raises UserError for any other."""
    if name not in PROFILES:
        raise UserError(f"There is no profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return PROFILES[name]
