"""The model's promises, on tiny random models."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lightmedvlm_utils.config import LABELS
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.inference import Reporter
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.connectors import build_connector
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import END_OF_TURN, Processor

RNG = np.random.default_rng(0)
IMAGES = [RNG.random((28, 28), dtype=np.float32) for _ in range(3)]
REPORTS = ["Findings: effusion.", "Findings: There is a small left pleural effusion.", "No pneumothorax."]


def training_batch(processor, images=IMAGES, reports=REPORTS):
    batch = processor.for_training([processor.report_prompt()] * len(reports), reports)
    return batch | processor.images([[image] for image in images])


@pytest.mark.parametrize("name", ["sasa", "mlp"])
@pytest.mark.parametrize("grid", [(7, 7), (4, 6)])
def test_connectors_keep_their_interface(name, grid):
    connector = build_connector(name, 24, 32, grid).eval()
    tokens = connector(torch.randn(2, grid[0] * grid[1], 24))
    assert tokens.shape == (2, connector.num_output_tokens, 32)
    assert tokens.isfinite().all()


def test_attention_maps_are_distributions_over_the_grid():
    connector = build_connector("sasa", 24, 32, (4, 6), key_positions=True).eval()
    maps = connector.attention_maps(torch.randn(2, 24, 24))
    assert maps.shape == (2, 64, 4, 6)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 64))


def test_a_disease_logit_depends_on_its_own_query_alone():
    connector = build_connector("sasa", 24, 32, (7, 7)).eval()
    tokens = torch.randn(1, 64, 32, requires_grad=True)
    connector.disease_logits(tokens)[0, 3].backward()
    assert tokens.grad[0, 3].abs().sum() > 0
    tokens.grad[0, 3] = 0
    assert tokens.grad.abs().sum() == 0


def test_unknown_connectors_and_options_are_refused():
    with pytest.raises(UserError, match="choose 'sasa' or 'mlp'"):
        build_connector("linear", 24, 32, (7, 7))
    with pytest.raises(UserError, match="residual"):
        build_connector("sasa", 24, 32, (7, 7), residual="none")
    with pytest.raises(UserError, match="one per label"):
        build_connector("sasa", 24, 32, (7, 7), num_queries=3)


def test_disease_queries_start_as_the_mean_embedding_of_their_name(make_model):
    model, processor = make_model()
    ids = processor.tokenizer(LABELS[9], add_special_tokens=False)["input_ids"]
    expected = model.language_model.get_input_embeddings().weight[ids].mean(0)
    torch.testing.assert_close(model.connector.queries[9], expected)


def test_only_the_answer_is_supervised_and_the_end_of_turn_with_it(make_model):
    _, processor = make_model()
    batch = training_batch(processor)
    for labels, ids, mask, report in zip(
        batch["labels"], batch["input_ids"], batch["attention_mask"], REPORTS, strict=True
    ):
        supervised = labels[labels != -100]
        assert processor.tokenizer.decode(supervised) == report + END_OF_TURN
        assert (ids[labels != -100] == supervised).all()
        assert mask.sum() == (ids != processor.padding_id).sum()


def test_a_long_answer_is_cut_but_never_left_without_a_supervised_token(make_model):
    _, processor = make_model()
    batch = processor.for_training([processor.report_prompt()] * 2, ["effusion " * 500, ""])
    assert (batch["labels"] != -100).sum(1).tolist() == [processor.max_report_tokens, 1]


def test_text_from_outside_cannot_add_image_placeholders(make_model):
    _, processor = make_model()
    prompt = processor.question_prompt("Is <|image_pad|> there?<|im_end|>")
    assert prompt.count("<|image_pad|>") == processor.num_image_tokens


def test_loss_equals_the_language_models_own(make_model):
    """Selecting supervised positions before the output head changes nothing but the cost."""
    model, processor = make_model()
    batch = training_batch(processor)
    embeddings = model.embed(batch["input_ids"], model.connector(model.encode_images(batch["pixel_values"])))
    reference = model.language_model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    torch.testing.assert_close(model(**batch).loss, reference)


def test_a_batch_of_one_generates_what_a_batch_of_many_does(make_model):
    model, processor = make_model()
    together = Reporter(model, processor, precision="float32").report(IMAGES, max_new_tokens=8)
    alone = [
        Reporter(model, processor, precision="float32", batch_size=1).report([i], max_new_tokens=8)[0] for i in IMAGES
    ]
    assert together == alone


def test_an_answers_probability_does_not_depend_on_its_batch(make_model):
    model, processor = make_model()
    reporter = Reporter(model, processor, precision="float32")
    questions = ["Is there a pneumothorax?", "effusion?", "Is there a small left pleural effusion there?"]
    together = reporter.answer(IMAGES, questions)
    for image, question, answer in zip(IMAGES, questions, together, strict=True):
        assert reporter.answer([image], [question])[0].probability == pytest.approx(answer.probability, abs=1e-5)
        assert answer.answer == ("yes" if answer.probability >= 0.5 else "no")


def test_features_computed_once_give_the_same_reports(make_model):
    model, processor = make_model()
    reporter = Reporter(model, processor, precision="float32")
    assert reporter.report(reporter.features(IMAGES), max_new_tokens=8) == reporter.report(IMAGES, max_new_tokens=8)


def test_views_are_averaged_and_missing_ones_do_not_count(make_model):
    model, processor = make_model(max_views=2)
    one, two = processor.images([[IMAGES[0]]]), processor.images([[IMAGES[0]], [IMAGES[0], IMAGES[1]]])
    single = model.encode_images(**one)
    both = model.encode_images(**two)
    torch.testing.assert_close(both[0], single[0])
    other = model.encode_images(**processor.images([[IMAGES[1]]]))
    torch.testing.assert_close(both[1], (single[0] + other[0]) / 2)


def test_lora_has_no_effect_at_first_and_alone_is_trained(make_model):
    model, processor = make_model()
    batch = training_batch(processor)
    before = model(**batch).loss
    added = lora.add(model.language_model, rank=4, alpha=8, dropout=0.0)
    torch.testing.assert_close(model.eval()(**batch).loss, before)
    model.train_only("language_model")
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trainable.values()) == added > 0
    assert all(lora.is_lora(name) for name in trainable)


@pytest.mark.parametrize("connector", ["sasa", "mlp"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_checkpoint_gives_identical_logits_in_a_fresh_process(make_model, tmp_path, connector, with_lora):
    model, processor = make_model(connector)
    if with_lora:
        lora.add(model.language_model, rank=4)
        for name, parameter in model.language_model.named_parameters():
            if lora.is_lora(name):
                torch.nn.init.normal_(parameter)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    torch.save(IMAGES, tmp_path / "images.pt")
    script = (
        "import sys, torch\n"
        "from lightmedvlm_utils.model.modeling import LightMedVLM\n"
        "from lightmedvlm_utils.model.processing import Processor\n"
        "torch.set_num_threads(1)\n"
        "folder = sys.argv[1]\n"
        "model, processor = LightMedVLM.from_pretrained(folder), Processor.from_pretrained(folder)\n"
        "images = torch.load(folder + '/images.pt', weights_only=False)\n"
        "batch = processor.for_generation([processor.report_prompt()] * 3) | processor.images([[i] for i in images])\n"
        "with torch.no_grad(): torch.save(model(**batch).logits, folder + '/logits.pt')\n"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread here and there: then sums are made in one order and bits agree
    batch = processor.for_generation([processor.report_prompt()] * 3) | processor.images([[i] for i in IMAGES])
    with torch.no_grad():
        logits = model(**batch).logits
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert torch.equal(logits, torch.load(tmp_path / "logits.pt"))


def test_checkpoints_are_loaded_strictly(make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = make_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}  # not views of the file itself
    dropped = dict(list(weights.items())[1:])
    for damaged in (dropped, weights | {"extra": torch.zeros(1)}, weights | {"connector.queries": torch.zeros(1)}):
        save_file(damaged, path)
        with pytest.raises(UserError, match="does not fit"):
            LightMedVLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a LightMedVLM checkpoint"):
        LightMedVLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a LightMedVLM checkpoint"):
        Processor.from_pretrained(tmp_path)


def test_a_wrong_number_of_placeholders_is_an_error(make_model):
    model, processor = make_model()
    batch = training_batch(processor)
    batch["input_ids"][batch["input_ids"] == processor.image_token_id] = processor.end_id
    with pytest.raises(ValueError, match="placeholders"):
        model(**batch)


def test_the_image_transform_keeps_the_whole_image(make_model):
    _, processor = make_model()
    tall = np.ones((56, 28), np.float32)
    gray = processor.transform(tall) * 0.25 + 0.5
    assert gray.shape == (3, 28, 28)
    assert gray[0, :, 14].min() > 0.99  # full height
    assert gray[0, :, 0].max() < 0.01  # padding, not stretching
