"""Images a second and core: from films of real size, and from the copies that were resized once.

    python benchmarks/loading.py                      # 12 drawn films of 2544 x 3056 pixels, as JPEG
    python benchmarks/loading.py --films 40

Prints CPU time on one thread, each way beside the first, and how many cores would keep a card busy that trains the
thesis' model (Swin-B, Qwen3-0.6B; stage 2, where all of it learns). What the card needs is computed, not measured: the
operations of a step as torch counts them, at the throughput that is assumed for each card.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lightmedvlm_utils.data.images import read_image
from lightmedvlm_utils.learning.cache import ImageCache
from lightmedvlm_utils.model.backbones import from_backbones
from lightmedvlm_utils.model.processing import Processor
from lightmedvlm_utils.phantom.images import render
from lightmedvlm_utils.phantom.patients import sample_patients

SIZE = (3056, 2544)  # of most MIMIC-CXR-JPG films
CARDS = {"T4": 20.0, "RTX 3090": 28.0, "H100": 350.0}  # assumed TFLOP/s in 16 bit, about two fifths of the peak
REPORT_TOKENS = 110


def draw_films(folder: Path, count: int) -> list[str]:
    """Phantoms enlarged to the size of a real film, with grain, so that they compress like one."""
    rng, paths = np.random.default_rng(0), []
    for number, patient in enumerate(sample_patients(count, 7)):
        study = patient.studies[0]
        view = next(view for view in study.views if view.position != "LATERAL")
        film = Image.fromarray(render(study, view, 512)[0]).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        grain = np.asarray(film, np.int16) + rng.integers(-6, 7, SIZE)
        path = folder / f"{number}.jpg"
        Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(path, quality=95)
        paths.append(str(path))
    return paths


def per_image(work: Callable[[str], object], paths: list[str]) -> float:
    """Median CPU seconds of one image."""
    seconds = []
    for path in paths:
        started = time.process_time()
        work(path)
        seconds.append(time.process_time() - started)
    return float(np.median(seconds))


def training_flops() -> float:
    """Floating-point operations of one report with one image in stage 2, forward and backward, at real size."""
    with torch.device("meta"):
        model, processor = from_backbones(
            "swin_base_patch4_window7_224.ms_in1k", "Qwen/Qwen3-0.6B", random_init=True, tokenizer="small"
        )
    tokens = REPORT_TOKENS + processor.num_image_tokens + 30
    ids = torch.full((1, tokens), 5, device="meta")
    counter = FlopCounterMode(display=False)
    with counter:
        embeddings = model.get_input_embeddings()(ids)
        hidden = model.language_model.model(inputs_embeds=embeddings).last_hidden_state
        language = model.language_model.lm_head(hidden[:, -REPORT_TOKENS:]).sum()
        seen = model.vision_encoder.forward_features(torch.zeros(1, 3, 224, 224, device="meta"))
        (language + seen.sum()).backward()
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, small = from_backbones()
    processor = Processor(small.tokenizer, 224, (0.5,) * 3, (0.5,) * 3, num_image_tokens=64)
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_films(Path(folder), options.films)
        started = time.process_time()
        cache = ImageCache(Path(folder) / "cache", paths, processor).build(jobs=1)
        building = (time.process_time() - started) / len(paths)
        ways = {
            "original": lambda path: processor.transform(read_image(path)),
            "original, decoded at reduced scale": lambda path: processor.transform(read_image(path, smallest=448)),
            "resized once": lambda path: processor.normalize(cache[path]),
        }
        found = {name: per_image(work, paths) for name, work in ways.items()}
    flops = training_flops()
    print(f"\n{options.films} films of {SIZE[1]} x {SIZE[0]} pixels; caching costs {building * 1e3:.0f} ms each, once")
    print(f"one report with one image in stage 2: {flops / 1e12:.2f} TFLOP, forward and backward")
    header = "".join(f"{name:>14}" for name in CARDS)
    print(f"{'read from':<38}{'ms':>7}{'a second':>10}{'ratio':>8}   cores to feed one:{header}")
    for name, seconds in found.items():
        cores = "".join(f"{seconds * rate * 1e12 / flops:>14.2f}" for rate in CARDS.values())
        ratio = found["original"] / seconds
        print(f"{name:<38}{seconds * 1e3:>7.2f}{1 / seconds:>10.0f}{ratio:>8.1f}{'':21}{cores}")


if __name__ == "__main__":
    main()
