"""`python -m lightmedvlm_utils.pretrain vision | language`: make the shipped backbones anew (`make backbones`)."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from lightmedvlm_utils.runs import outputs_root


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lightmedvlm_utils.pretrain", description=__doc__)
    parser.add_argument("what", choices=["render", "vision", "language"])
    parser.add_argument("--minutes", type=float, default=60, help="training time; the schedule follows the clock")
    parser.add_argument("--patients", type=int, default=12_000, help="phantom patients to render for the Swin")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=outputs_root() / "backbones")
    parser.add_argument("--target", type=Path, help="default: the package's own backbones folder")
    parser.add_argument("--studies", type=Path, default=outputs_root() / "laptop/01_data_cleaning/studies.parquet")
    options = parser.parse_args()
    if options.what == "render":
        from lightmedvlm_utils.pretrain.vision import render_phantoms

        paths = render_phantoms(options.cache, options.patients, options.workers)
        print(f"{len(paths)} files in {options.cache}")
        return
    from lightmedvlm_utils.model.backbones import SMALL_LANGUAGE_MODEL, SMALL_VISION

    if options.what == "vision":
        from lightmedvlm_utils.pretrain.vision import pretrain_vision

        record = pretrain_vision(options.target or SMALL_VISION, options.cache, options.minutes)
    else:
        import pandas as pd

        from lightmedvlm_utils.pretrain.language import pretrain_language

        studies = pd.read_parquet(options.studies)
        record = pretrain_language(studies, options.target or SMALL_LANGUAGE_MODEL, options.minutes)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
