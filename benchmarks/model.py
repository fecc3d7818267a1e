"""What one training step and one batch of reports cost, beside the naive way of doing the same.

    python benchmarks/model.py [--size small|thesis] [--batch 8] [--tokens 20] [--json]

Naive: every position through the output head, every target padded to 100 tokens, one image at a time through encoder
and connector, one report at a time. Both ways learn the same tokens and start from the same random weights of the
size asked for. Each measurement has a process of its own, on the CPU and, where there is one, on CUDA; it repeats the
work after one unmeasured round and prints the fastest. Peak memory is that of the process (CPU) or of its tensors
(CUDA), model included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

SIZES = {  # vision, language model, number of queries
    "small": ("small", "small", 20),
    "thesis": ("swin_base_patch4_window7_224.ms_in1k", "Qwen/Qwen3-0.6B", 64),
}
PADDED = 100  # tokens, where the naive way pads to


def build(size: str, batch: int, device: str):
    """(model, processor, images, training batch) with random weights and LoRA."""
    import numpy as np

    from lightmedvlm_utils.model import from_backbones, lora

    vision, llm, queries = SIZES[size]
    model, processor = from_backbones(
        vision, llm, random_init=True, connector_options={"num_queries": queries}, max_report_tokens=PADDED
    )
    lora.add(model.language_model)
    model.train_only("connector", "language_model")
    images = [np.random.default_rng(i).random((256, 256), np.float32) for i in range(batch)]
    lengths = [1 + 12 * (i + 1) // batch for i in range(batch)]
    targets = ["Findings: There is a small left pleural effusion. " * n for n in lengths]
    training = processor.for_training([processor.report_prompt()] * batch, targets)
    return model.to(device), processor, images, {name: value.to(device) for name, value in training.items()}


def train_ours(model, processor, images, training, tokens):
    pixels = {name: value.to(model.device) for name, value in processor.images([[i] for i in images]).items()}
    model(**training, **pixels).loss.backward()


def train_naive(model, processor, images, training, tokens):
    import torch
    from torch.nn.functional import pad

    prompt = processor.for_generation([processor.report_prompt()])["input_ids"].shape[1]
    missing = prompt + PADDED - training["labels"].shape[1]
    ids = pad(training["input_ids"], (0, missing), value=processor.padding_id)
    mask, labels = pad(training["attention_mask"], (0, missing)), pad(training["labels"], (0, missing), value=-100)
    seen = torch.cat([model.image_tokens(one_image(model, processor, image)) for image in images])
    logits = model.language_model(inputs_embeds=model.embed(ids, seen), attention_mask=mask).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).backward()


def generate_ours(model, processor, images, training, tokens):
    inputs = {name: value.to(model.device) for name, value in processor(images).items()}
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def generate_naive(model, processor, images, training, tokens):
    for image in images:
        ids = processor.for_generation([processor.report_prompt()])["input_ids"].to(model.device)
        embedded = model.embed(ids, model.image_tokens(one_image(model, processor, image)))
        model.language_model(inputs_embeds=embedded)  # all logits of the prompt, for the sake of the last
        model.language_model.generate(
            inputs_embeds=embedded,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=processor.padding_id,
        )


def one_image(model, processor, image):
    return processor.images([[image]])["pixel_values"].to(model.device)


def measure(work: str, way: str, device: str, size: str, batch: int, tokens: int, rounds: int) -> dict:
    """Seconds of the fastest round and peak memory in GB of this process."""
    import torch

    model, *rest = build(size, batch, device)
    model.train(work == "train")
    model.vision_encoder.eval()
    run, seconds = globals()[f"{work}_{way}"], []
    with torch.set_grad_enabled(work == "train"):
        for _ in range(rounds + 1):
            started = time.perf_counter()
            run(model, *rest, tokens)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            model.zero_grad()
    unit = 1e6 if sys.platform != "darwin" else 1e9  # kilobytes, or bytes
    cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else cpu
    return {"work": work, "way": way, "device": device, "seconds": min(seconds[1:]), "gigabytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        work, way, device = a.one
        print(json.dumps(measure(work, way, device, a.size, a.batch, a.tokens, a.rounds)))
        return
    import torch

    rows = []
    options = [f"--{name}={getattr(a, name)}" for name in ("size", "batch", "tokens", "rounds")]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for work in ("train", "generate"):
            for way in ("ours", "naive"):
                command = [sys.executable, __file__, *options, "--one", work, way, device]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    if a.json:
        print(json.dumps({"size": a.size, "batch": a.batch, "tokens": a.tokens, "rows": rows}, indent=1))
        return
    print(f"size {a.size}, batch {a.batch}, {a.tokens} new tokens; {torch.get_num_threads()} threads")
    print(f"{'':16}{'ours':>18}{'naive':>18}   ratio of time, memory")
    for ours, naive in zip(rows[::2], rows[1::2], strict=True):
        cells = [f"{row['seconds']:8.2f} s {row['gigabytes']:5.2f} GB" for row in (ours, naive)]
        ratios = [naive[key] / ours[key] for key in ("seconds", "gigabytes")]
        print(f"{ours['work'] + ' ' + ours['device']:16}{cells[0]}{cells[1]}   {ratios[0]:.1f}, {ratios[1]:.1f}")


if __name__ == "__main__":
    main()
