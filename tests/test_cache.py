"""Images resized once are the images: nothing is lost, nothing half written, and what cannot be read is said."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lightmedvlm_utils.data.images import read_image
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.learning import cache as module
from lightmedvlm_utils.learning.cache import ImageCache
from lightmedvlm_utils.learning.features import ImageStore
from lightmedvlm_utils.model.processing import Processor


@pytest.fixture
def processor(tiny_tokenizer):
    return Processor(tiny_tokenizer, (32, 32), (0.4,) * 3, (0.2,) * 3, num_image_tokens=4, max_views=2)


@pytest.fixture
def films(tmp_path):
    """Ten films of several shapes; the first is large enough to be decoded at a quarter of its size."""
    rng, paths = np.random.default_rng(0), []
    for number in range(10):
        height, width = (640, 520) if number == 0 else rng.integers(40, 90, 2)
        smooth = np.kron(rng.integers(0, 256, (8, 8)), np.ones((height // 8 + 1, width // 8 + 1)))[:height, :width]
        Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / f"{number}.jpg", quality=95)
        paths.append(str(tmp_path / f"{number}.jpg"))
    return paths


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cached_image_is_the_image(films, processor, tmp_path, monkeypatch, jobs):
    monkeypatch.setattr(module, "_CHUNK", 3)
    cache = ImageCache(tmp_path / "cache", films, processor).build(jobs, say=lambda line: None)
    for path in films:
        difference = (cache[path] - processor.gray(read_image(path))).abs()
        # Half a gray level; of the film decoded at a quarter of its size the edges differ, and it is all edges.
        assert difference.mean() < 0.03 if path == films[0] else difference.max() < 0.003
    studies = pd.DataFrame(
        {"study_id": [1, 2], "images": [[{"path": films[1]}, {"path": films[2]}], [{"path": films[3]}]]}
    )
    plain, cached = (ImageStore(studies, processor, one)([2, 1]) for one in (None, cache))
    assert torch.equal(plain["view_mask"], cached["view_mask"]) and plain["view_mask"].tolist() == [[1, 0], [1, 1]]
    torch.testing.assert_close(plain["pixel_values"], cached["pixel_values"], atol=0.02, rtol=0)
    expected = processor.images([[films[3]], films[1:3]])["pixel_values"]
    assert torch.equal(plain["pixel_values"], expected)


def test_building_goes_on_where_it_was_stopped(films, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 3)
    read, stop_at = [], 5

    def reading(path, smallest=0):
        if len(read) == stop_at:
            raise KeyboardInterrupt
        read.append(path)
        return read_image(path, smallest)

    monkeypatch.setattr(module, "read_image", reading)
    cache, said = ImageCache(tmp_path / "cache", films, processor), []
    with pytest.raises(KeyboardInterrupt):
        cache.build(1, said.append)
    stop_at = -1
    cache.build(1, said.append)
    assert read == [*films[:5], *films[3:]], "a chunk that was not finished is read again, the finished one is not"
    assert said[1].startswith("resizing 7 of 10 images once")
    ImageCache(tmp_path / "cache", films, processor).build(1, said.append)
    assert len(said) == 2 and len(read) == 12
    whole = ImageCache(tmp_path / "other", films, processor).build(1, said.append)
    assert all(torch.equal(cache[path], whole[path]) for path in films)


def test_a_file_that_is_written_again_is_another_image(films, processor, tmp_path):
    threads = torch.get_num_threads()
    before = ImageCache(tmp_path / "cache", films, processor).build(1, say=lambda line: None)[films[1]]
    Image.fromarray(np.tile(np.arange(0, 200, 2, dtype=np.uint8), (70, 1))).save(films[1])
    after = ImageCache(tmp_path / "cache", films, processor).build(1, say=lambda line: None)[films[1]]
    torch.testing.assert_close(after, processor.gray(read_image(films[1])), atol=0.003, rtol=0)
    assert (after - before).abs().mean() > 0.05
    assert torch.get_num_threads() == threads, "what reads in this process must not slow the training down"


def test_what_cannot_be_read_is_said_and_a_small_disk_too(films, processor, tmp_path, monkeypatch):
    Image.fromarray(np.zeros((50, 50), np.uint8)).save(films[2])
    with pytest.raises(UserError, match=r"1 images cannot be used; the first: .*2\.jpg is blank"):
        ImageCache(tmp_path / "cache", films, processor).build(1, say=lambda line: None)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Disk", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"0\.0 GB left"):
        ImageCache(tmp_path / "small", films, processor).build(1)


def test_a_processor_can_be_sent_to_another_process(processor):
    again = pickle.loads(pickle.dumps(processor))
    text = ["prompt"], ["No effusion."]
    for name, value in processor.for_training(*text).items():
        assert torch.equal(again.for_training(*text)[name], value)
