"""Make the small shipped backbones anew: `make backbones`, or `python -m lightmedvlm_utils.pretrain vision`.

All learn from phantom patients of their own, whom no run of the course ever draws.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import BACKBONES, outputs_root


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lightmedvlm_utils.pretrain", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["vision", "masked", "language", "all"], default="all")
    parser.add_argument("--vision-minutes", type=float, default=60, help="training time of each Swin")
    parser.add_argument("--start", type=Path, help="folder of an earlier Swin to continue from, instead of anew")
    parser.add_argument(
        "--language-start", type=Path, help="folder of an earlier Qwen3 to go on to the last phase from"
    )
    parser.add_argument("--patients", type=int, default=16000, help="phantom patients to learn from")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render and train")
    parser.add_argument("--cache", type=Path, default=outputs_root() / "backbones", help="where rendered phantoms lie")
    parser.add_argument("--target", type=Path, help="default: the package's own backbones folder")
    return parser.parse_args(arguments)


def make_vision(options: argparse.Namespace) -> dict:
    from lightmedvlm_utils.pretrain.vision import VisionRun, pretrain_vision, render_phantoms

    render_phantoms(options.cache, options.patients, options.workers)
    target = (options.target or BACKBONES) / "swin"
    run = VisionRun(target, options.cache, options.vision_minutes, options.start, options.workers)
    return pretrain_vision(run)


def make_masked(options: argparse.Namespace) -> dict:
    from lightmedvlm_utils.pretrain.masked import MaskedRun, pretrain_masked
    from lightmedvlm_utils.pretrain.vision import render_phantoms

    render_phantoms(options.cache, options.patients, options.workers)
    target = (options.target or BACKBONES) / "swin-masked"
    return pretrain_masked(MaskedRun(target, options.cache, options.vision_minutes / 2))


def make_language(options: argparse.Namespace) -> dict:
    from lightmedvlm_utils.pretrain.language import PHASES, pretrain_language

    start = options.language_start
    target = (options.target or BACKBONES) / "qwen3"
    return pretrain_language(target, options.patients, PHASES[-1:] if start else PHASES, start)


def main() -> int:
    options = parse()
    try:
        for name, make in (("language", make_language), ("vision", make_vision), ("masked", make_masked)):
            if options.what in (name, "all"):
                print(json.dumps({name: make(options)}, indent=1))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
