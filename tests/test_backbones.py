"""The shipped backbones, and the scripts that make them."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from lightmedvlm_utils.config import get_profile
from lightmedvlm_utils.data.descriptions import WORDS, describe
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.files import BACKBONES
from lightmedvlm_utils.model import backbones, lora
from lightmedvlm_utils.model.processing import END_OF_TURN, IMAGE_TOKEN, REPORT_SYSTEM, REPORT_USER
from lightmedvlm_utils.observations import FINDINGS, LABELS
from lightmedvlm_utils.phantom.patients import sample_patients
from lightmedvlm_utils.pretrain import FIRST_SEED, language, masked, vision
from lightmedvlm_utils.settings import resolve


def test_the_shipped_backbones_are_small_and_hold_no_pickle():
    files = [path for path in BACKBONES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


@pytest.mark.parametrize("connector", ["sasa", "mlp"])
def test_a_model_is_assembled_from_them(connector):
    profile = get_profile("laptop")
    model, processor = backbones.from_profile(profile, connector)
    features = model.encode_images(**processor.images([[np.random.default_rng(0).random((64, 48), np.float32)]]))
    tokens = model.connector(features)
    assert tokens.shape[1:] == (processor.num_image_tokens, model.config.text.hidden_size)
    words = backbones.state_words(model.language_model, processor.tokenizer)
    assert 0.8 < tokens.std() / words.std() < 1.25  # connector tokens are as large as the words for a finding


def test_two_models_share_their_backbones_and_differ_in_the_seed_alone():
    profile = get_profile("smoke")
    first, second, other = (backbones.from_profile(profile, "sasa", seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    different = {name.split(".")[0] for name in first if not torch.equal(first[name], other[name])}
    assert different == {"connector"}


@pytest.mark.parametrize("text", ["A 1.2-cm nodule at T11.", "naïve “Ödem” 肺炎 \t end", "<b>& \\ \n\n no"])
def test_any_text_survives_the_tokenizer(text):
    _, tokenizer = backbones.load_language_model("small")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    for token in (END_OF_TURN, IMAGE_TOKEN, "<|im_start|>"):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1


SWIN_B, QWEN = "swin_base_patch4_window7_224.ms_in1k", "Qwen/Qwen3-0.6B"


@pytest.fixture(scope="module")
def real_size():
    """The thesis profile as it is rehearsed where its weights are not: `--set random_init=true`."""
    with torch.device("meta"):  # shapes without numbers
        return backbones.from_profile(resolve("thesis", {"random_init": True}))


def test_the_real_size_needs_no_download(real_size):
    model, processor = real_size
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["vision_encoder"] == 86_743_224 and counts["language_model"] == 596_049_920
    assert model.grid == (7, 7) and model.connector.num_output_tokens == 64
    assert (processor.image_size, processor.interpolation) == (224, "bicubic")
    assert lora.add(model.language_model, rank=8) == 2_293_760


REAL_TOKENIZER = Path(__file__).parents[2] / "shared/qwen3-tokenizer"


@pytest.mark.skipif(not REAL_TOKENIZER.is_dir(), reason="the real tokenizer is not here")
def test_prompts_are_qwens_own_chat_format():
    with torch.device("meta"):
        model, processor = backbones.from_backbones(SWIN_B, QWEN, random_init=True, tokenizer=str(REAL_TOKENIZER))
    assert (processor.image_token_id, processor.end_id, processor.padding_id) == (151655, 151645, 151643)
    assert model.config.image_token_id == 151655 and model.generation_config.eos_token_id == 151645
    image = IMAGE_TOKEN * 64
    turns = [
        {"role": "system", "content": REPORT_SYSTEM},
        {"role": "user", "content": REPORT_USER.format(image=image)},
    ]
    expected = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert processor.report_prompt() == expected
    ids = processor.for_generation([processor.report_prompt()])["input_ids"][0]
    assert (ids == 151655).sum() == 64
    yes, no = processor.answer_ids()
    assert processor.tokenizer.decode([yes]) == "yes" and processor.tokenizer.decode([no]) == "no"


def test_an_encoder_takes_its_own_size_of_image():
    with pytest.raises(UserError, match="takes images of"):
        backbones.load_vision("small", 100)
    for unknown in ("resnet50", "swin_tiny_patch4_window7_224.nonsense", "swim"):
        with pytest.raises(UserError, match="neither a Swin of timm nor a folder"):
            backbones.load_vision(unknown, random_init=True)
    encoder, eye = backbones.load_vision("swinv2_tiny_window8_256", random_init=True)
    assert eye["arguments"]["img_size"] == 256 and encoder.num_features == 768


def test_weights_that_are_nowhere_name_what_to_download():
    with pytest.raises(UserError, match=r"huggingface\.co/Qwen/Qwen3-0\.6B"):
        backbones.load_language_model("Qwen/Qwen3-0.6B")
    with pytest.raises(UserError, match="neither a Swin of timm nor a folder"):
        backbones.load_vision("resnet50", 224)
    with pytest.raises(UserError, match=r"huggingface\.co/timm/swin_base"):
        backbones.load_vision(SWIN_B)


def test_facts_name_every_label_with_its_state():
    states = np.array([1.0, 0.0, -1.0] + [np.nan] * 11)
    report = "Findings: The lungs are clear. Small left atelectasis. Impression: B."
    described = describe(report)
    told = [language.facts(states, described, report, "PA", np.random.default_rng(i)) for i in range(40)]
    assert all(known[0][0] == (" Atelectasis present", 1.0) for known in told)
    words = [dict(known[0][1:]) for known in told]
    assert {tuple(own) for own in words} == {(), (" left", " small")}, "all of them or none, and the state always"
    assert all(0.4 <= share <= 1 for own in words for share in own.values())
    known = told[0]
    assert known[1:4] == [
        [(f" {label} {word}", 1.0)] for label, word in zip(LABELS[1:], ["absent", "possible", "absent"], strict=False)
    ]
    assert [(" PA view", 1.0)] in known and len(known) <= language.NUM_FACTS
    asked = [language.facts(states, described, report, "PA", np.random.default_rng(i), True) for i in range(20)]
    assert all(known[0] == [(" Atelectasis present", 1.0), (" left", 1.0), (" small", 1.0)] for known in asked)
    sentences = [phrase for study in asked for fact in study[15:] for phrase, _ in fact]
    assert set(sentences) == {" Small left atelectasis."} and 0 < len(sentences) < 20


def test_a_fact_is_the_sum_of_what_it_says(tiny_tokenizer):
    """As a disease token of SASA is: the two must mean the same to the language model."""
    model = language.small_language_model(tiny_tokenizer)
    reader, table = language.FactReader(tiny_tokenizer), model.get_input_embeddings()
    vectors = reader(table, [[[(" effusion", 1.0)], [(" left pleural", 1.0), (" small", 0.5)]], [[(" no", 1.0)]]])
    assert vectors.shape == (2, language.NUM_FACTS, table.embedding_dim)
    tokens = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" left pleural", " small")]
    means = [table.weight[ids].mean(0) for ids in tokens]
    torch.testing.assert_close(vectors[0, 1], means[0] + 0.5 * means[1])
    torch.testing.assert_close(vectors[1, 1], table.weight[tiny_tokenizer.pad_token_id])


def test_a_mirrored_report_is_mirrored_throughout():
    """Also at the start of a sentence, where an Impression names its side."""
    report = "Findings: Small left effusion. Right base is clear. Impression: Left effusion."
    mirrored = language.mirrored(report)
    assert mirrored == "Findings: Small right effusion. Left base is clear. Impression: Right effusion."
    sides = [WORDS.index(side) for side in ("right", "left")]
    assert (describe(mirrored)[:, sides] == describe(report)[:, sides[::-1]]).all() and describe(report).any()


def test_a_twin_differs_from_its_study_in_one_finding():
    rng = np.random.default_rng(0)
    for study in [study for patient in sample_patients(40, 3) for study in patient.studies]:
        own, other = (set(shown.findings) for shown in (study, vision.twin_of(study, rng)))
        assert len({finding.label for finding in own ^ other}) == 1


def test_augmentation_moves_image_and_masks_together():
    torch.manual_seed(0)
    size = vision.STORED_SIZE
    images = torch.zeros(8, size, size, dtype=torch.uint8)
    images[:, size // 4 : size // 2, size // 2 : 3 * size // 4] = 255
    masks = torch.zeros(8, len(FINDINGS), 32, 32, dtype=torch.bool)
    masks[:, 0, 8:16, 16:24] = True
    pixels, moved = vision.augment(images, masks)
    bright = (pixels[:, :1] * vision.STD[0] + vision.MEAN[0] > 0.5).float()
    seen = torch.nn.functional.adaptive_avg_pool2d(bright, moved.shape[-1])
    assert torch.corrcoef(torch.stack([seen.flatten(), moved[:, 0].flatten()]))[0, 1] > 0.9
    assert moved[:, 1:].sum() == 0


def test_pretraining_patients_are_not_the_courses():
    course = {p.anatomy_seed for p in sample_patients(50, 0)}
    assert course.isdisjoint(p.anatomy_seed for p in sample_patients(50, FIRST_SEED))


def test_the_swin_is_pretrained_by_several_processes_and_can_be_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "_CHUNK", 2)
    for chunk in range(2):
        vision.render_chunk(tmp_path, chunk)
    for start, runs, workers in ((None, 1, 2), (tmp_path / "swin", 2, 1)):
        record = vision.pretrain_vision(
            vision.VisionRun(tmp_path / "swin", tmp_path, minutes=0.001, start=start, workers=workers, batch_size=4)
        )
        assert len(record["runs"]) == runs and record["runs"][-1]["images_seen"] >= 4
    encoder, _ = backbones.load_vision(str(tmp_path / "swin"))
    assert encoder.forward_features(torch.zeros(1, 3, vision.IMAGE_SIZE, vision.IMAGE_SIZE)).shape == (1, 7, 7, 192)


def test_hidden_squares_are_filled_in_from_what_is_seen():
    encoder = timm.create_model(vision.ARCHITECTURE, num_classes=0, **vision.ARGUMENTS)
    model, hidden = masked.MaskedImages(encoder).eval(), masked.hide(2, torch.Generator().manual_seed(0))
    assert hidden.float().mean().item() == pytest.approx(masked.HIDDEN, abs=0.01)
    pixels = torch.randn(2, 1, 224, 224).expand(-1, 3, -1, -1)
    covered = hidden.repeat_interleave(masked.SQUARE, 1).repeat_interleave(masked.SQUARE, 2)[:, None]
    other = torch.where(covered, torch.randn_like(pixels), pixels)
    with torch.no_grad():
        assert torch.equal(model.painted(pixels, hidden), model.painted(other, hidden))
        assert not torch.equal(model(pixels, hidden), model(other, hidden)), "what is hidden is what is asked"


def test_the_swin_learns_without_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "_CHUNK", 2)
    for chunk in range(2):
        vision.render_chunk(tmp_path, chunk)
    record = masked.pretrain_masked(masked.MaskedRun(tmp_path / "swin", tmp_path, 0.001, batch_size=4))
    assert record["runs"][0]["images_seen"] >= 4 and record["held_out_error"] > 0
    encoder, _ = backbones.load_vision(str(tmp_path / "swin"))
    assert encoder.forward_features(torch.zeros(1, 3, vision.IMAGE_SIZE, vision.IMAGE_SIZE)).shape == (1, 7, 7, 192)


def test_reports_to_learn_from_are_labelled_and_of_nobody_in_the_course():
    table = language.report_table(40)
    assert list(table[list(LABELS)].columns) == list(LABELS) and (table.report != "").all()
    assert set(table.split) == {"train", "validate"} and table.study_id.is_unique
    assert table.report.str.contains("Impression:").mean() > 0.8
