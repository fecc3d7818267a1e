"""The model: Swin encoder -> connector (SASA or a plain projector) -> Qwen3 with LoRA."""
