"""The model: Swin encoder -> connector (SASA or a plain projector) -> Qwen3 with LoRA.

Importing it registers the model with transformers' Auto classes.
"""

from lightmedvlm_utils.model.backbones import from_backbones
from lightmedvlm_utils.model.configuration import LightMedVLMConfig
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import Processor

__all__ = ["LightMedVLM", "LightMedVLMConfig", "Processor", "from_backbones"]
