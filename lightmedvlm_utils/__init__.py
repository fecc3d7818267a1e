"""LightMedVLM: the code that the course notebooks share."""

__version__ = "0.1.0"
