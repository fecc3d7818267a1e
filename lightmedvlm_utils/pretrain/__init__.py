"""Makes the small shipped backbones: a Swin pretrained on phantoms and a Qwen3 pretrained on reports about them.

They stand in for the ImageNet Swin and for Qwen3-0.6B where there is no download and no GPU.
"""

FIRST_SEED = 1_000_000  # of the phantoms that they learn from; course runs use small seeds
