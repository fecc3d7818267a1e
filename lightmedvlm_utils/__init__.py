"""LightMedVLM: what the course's notebooks share."""

import time

__version__ = "0.1.0"
LOADED_AT = time.time()  # source files edited later are not what this process runs
