"""The model's promises, on tiny random models."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from timm.layers import DropPath

from lightmedvlm_utils.data.descriptions import WORDS
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.inference import Reporter
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.configuration import LightMedVLMConfig
from lightmedvlm_utils.model.connectors import STATES, build_connector
from lightmedvlm_utils.model.connectors.base import Known, Words
from lightmedvlm_utils.model.connectors.losses import POSITIVE_WEIGHT, token_logits, token_loss
from lightmedvlm_utils.model.modeling import LightMedVLM
from lightmedvlm_utils.model.processing import END_OF_TURN, Processor
from lightmedvlm_utils.observations import LABELS

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


def sasa_with_words(**options):
    """A SASA whose diseases and states have random words."""
    torch.manual_seed(0)
    connector = build_connector("sasa", 24, 32, (7, 7), **options)
    names, states = 0.02 * torch.randn(len(LABELS), 32), torch.randn(len(LABELS), len(STATES), 32)
    connector.start_from_words(Words(names, states, torch.randn(len(WORDS), 32)))
    return connector.eval()


def test_a_disease_logit_depends_on_its_own_query_alone():
    connector, features = sasa_with_words(), torch.randn(1, 49, 24)
    tokens = connector(features).detach().requires_grad_()
    logits = token_logits(tokens, connector.state_words)
    torch.testing.assert_close(logits, connector.disease_logits(features))
    logits[0, 3].backward()
    assert tokens.grad[0, 3].abs().sum() > 0
    tokens.grad[0, 3] = 0
    assert tokens.grad.abs().sum() == 0


def test_disease_loss_and_logits_measure_the_distance_from_the_words():
    connector = sasa_with_words()
    targets = torch.tensor([[0.0] * 14, [0.5] * 14, [1.0] * 14])
    tokens = torch.zeros(3, 64, 32)
    tokens[:, :14] = connector.state_words.transpose(0, 1)  # row k says the words of state k
    words = connector.state_words
    assert token_loss(tokens, targets, words) == 0
    unknown = targets.clone()
    unknown[:, 1:] = torch.nan
    assert token_loss(tokens, unknown, words) == 0
    assert token_loss(tokens[[2]], targets[[0]], words).item() == pytest.approx(1)  # "present" where absent
    assert token_loss(tokens[[0]], targets[[2]], words).item() == pytest.approx(POSITIVE_WEIGHT)
    logits = token_logits(tokens, words)
    torch.testing.assert_close(logits[0], torch.full((14,), -3.0))
    torch.testing.assert_close(logits[2], torch.full((14,), 3.0))


def test_the_best_token_under_doubt_is_the_weighted_mean_of_the_words():
    connector = sasa_with_words()
    tokens = torch.zeros(1, 64, 32, requires_grad=True)
    for _ in range(200):  # one finding in four studies present, each weighing POSITIVE_WEIGHT
        targets = torch.tensor([[1.0] * 14, *[[0.0] * 14] * 3])
        (gradient,) = torch.autograd.grad(token_loss(tokens.expand(4, -1, -1), targets, connector.state_words), tokens)
        tokens = (tokens - 50 * gradient).detach().requires_grad_()
    weight = POSITIVE_WEIGHT / (POSITIVE_WEIGHT + 3)
    absent, present = connector.state_words[:, 0], connector.state_words[:, 2]
    torch.testing.assert_close(tokens[0, :14], weight * present + (1 - weight) * absent, atol=1e-3, rtol=1e-3)


def test_unknown_connectors_and_options_are_refused():
    with pytest.raises(UserError, match="choose one of sasa, mlp, c-abstractor, resampler"):
        build_connector("linear", 24, 32, (7, 7))
    with pytest.raises(UserError, match="residual"):
        build_connector("sasa", 24, 32, (7, 7), residual="none")
    with pytest.raises(UserError, match="one per label"):
        build_connector("sasa", 24, 32, (7, 7), num_queries=3)
    with pytest.raises(UserError, match="has no option 'queries'"):
        build_connector("sasa", 24, 32, (7, 7), queries=20)
    with pytest.raises(UserError, match="heads"):
        build_connector("sasa", 24, 32, (7, 7), num_heads=5)


SASA_OPTIONS = [
    {"num_queries": 20},
    {"num_queries": 3, "query_start": "random", "disease_head": False},
    {"conv": False},
    {"conv_norm": "group"},
    {"key_positions": True, "residual": "normed"},
]


@pytest.mark.parametrize("options", SASA_OPTIONS)
def test_every_option_of_sasa_learns_from_a_batch_of_one(options):
    connector = build_connector("sasa", 24, 32, (4, 6), **options).train()
    words = 0.02 + 0.01 * torch.randn(len(LABELS), 1 + len(STATES), 32)
    connector.start_from_words(Words(words[:, 0], words[:, 1:], torch.randn(len(WORDS), 32)))
    tokens = connector(torch.randn(1, 24, 24))
    assert tokens.shape == (1, options.get("num_queries", 64), 32)
    tokens.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in connector.parameters())


def test_group_normalisation_sees_each_study_alone():
    torch.manual_seed(0)
    batch = torch.randn(3, 49, 24)
    for norm, independent in (("group", True), ("batch", False)):
        connector = build_connector("sasa", 24, 32, (7, 7), conv_norm=norm, dropout=0.0).train()
        assert torch.allclose(connector(batch)[:1], connector(batch[:1]), atol=1e-5) == independent


@pytest.mark.parametrize("start", ["diseases", "random"])
@pytest.mark.parametrize("match", [False, True])
def test_queries_start_where_the_options_say(start, match):
    torch.manual_seed(0)
    diseases = 0.02 * torch.randn(len(LABELS), 32)
    connector = build_connector("sasa", 24, 32, (7, 7), query_start=start, match_query_scale=match)
    states, descriptions = torch.zeros(len(LABELS), len(STATES), 32), torch.zeros(len(WORDS), 32)
    connector.start_from_words(Words(diseases, states, descriptions))
    assert torch.equal(connector.queries[: len(LABELS)], diseases) == (start == "diseases")
    assert connector.queries[len(LABELS) :].std().item() == pytest.approx(0.02 if match else 1.0, rel=0.1)


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


def test_a_long_answer_is_cut_and_still_ends(make_model):
    _, processor = make_model()
    sentence = "No pneumothorax. "
    long = ["effusion " * 500, "", sentence * 50, sentence * 50 + "no " * 500]
    labels = processor.for_training([processor.report_prompt()] * len(long), long)["labels"]
    for row, text in zip(labels, long, strict=True):
        supervised = row[row != -100]
        assert 1 <= len(supervised) <= processor.max_report_tokens
        assert supervised[-1] == processor.end_id
        assert text.startswith(processor.tokenizer.decode(supervised[:-1]))
    assert (labels[0] != -100).sum() == processor.max_report_tokens  # no sentence ends: cut hard
    assert processor.tokenizer.decode(labels[2][labels[2] != -100]).endswith("pneumothorax." + END_OF_TURN)


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


def test_views_side_by_side_are_the_studys_images_one_after_the_other(make_model):
    model, processor = make_model(max_views=4, views="side_by_side")
    studies = [IMAGES[:1], IMAGES, [*IMAGES, IMAGES[0]], IMAGES[1:]]
    inputs = processor(studies)
    Q = processor.num_image_tokens
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [Q, 3 * Q, 4 * Q, 2 * Q]
    together = model(**inputs).logits[:, -1]
    alone = torch.cat([model(**processor([study])).logits[:, -1] for study in studies])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    tokens = model.image_tokens(inputs["pixel_values"], inputs["view_mask"])  # ten views
    embedded = model.embed(inputs["input_ids"], tokens)
    places = inputs["input_ids"][1] == processor.image_token_id
    assert torch.equal(embedded[1][places], tokens[1:4].flatten(0, 1))
    features = model.encode_images(inputs["pixel_values"], inputs["view_mask"])
    assert model.disease_logits(features, inputs["view_mask"]).shape == (4, len(LABELS))
    training = processor.for_training([processor.report_prompt(len(study)) for study in studies], [*REPORTS, ""])
    images = {name: inputs[name] for name in ("pixel_values", "view_mask")}
    known = Known(torch.ones(4, len(LABELS)), torch.zeros(4, len(LABELS), len(WORDS)))
    assert model(**training, **images, known=known, disease_weight=1.0).loss.isfinite()
    with pytest.raises(UserError, match="average"):
        Reporter(model, processor, precision="float32").features(studies)
    assert len(Reporter(model, processor, precision="float32").report(studies, max_new_tokens=4)) == 4


def test_reports_from_many_views_do_not_depend_on_their_batch(make_model):
    for views in ("mean", "side_by_side"):
        model, processor = make_model(max_views=4, views=views)
        reporter = Reporter(model, processor, precision="float32")
        studies = [IMAGES[:1], IMAGES, IMAGES[1:]]
        assert reporter.report(studies, max_new_tokens=6) == [
            reporter.report([study], max_new_tokens=6)[0] for study in studies
        ]


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_is_transformers_own(make_model, options):
    """Prompt and answer come back, and the answer is the bare language model's on the same embeddings."""
    model, processor = make_model()
    inputs = processor(IMAGES)
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": processor.end_id, "pad_token_id": 0, **options}
    ids = model.generate(**inputs, **common)
    assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    tokens = model.image_tokens(inputs["pixel_values"], inputs["view_mask"])
    reference = model.language_model.generate(
        inputs_embeds=model.embed(inputs["input_ids"], tokens), attention_mask=inputs["attention_mask"], **common
    )
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], reference)


def test_greedy_generation_follows_the_logits_and_sampling_its_seed(make_model):
    model, processor = make_model()
    inputs = processor(IMAGES)
    prompt = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    again = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, logits_to_keep=0).logits
    assert torch.equal(again[:, prompt:-1].argmax(-1), ids[:, prompt + 1 :])
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=True))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_only_labelled_and_last_positions_reach_the_output_head(make_model):
    model, processor = make_model()
    seen = []
    model.language_model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    batch = training_batch(processor)
    model(**batch)
    inputs = processor(IMAGES)
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert seen == [(batch["labels"] != -100).sum(), 3, 3]


def test_attention_maps_are_named_by_disease(make_model):
    model, processor = make_model()
    images = processor.images([[image] for image in IMAGES])
    maps = model.attention_maps(**images).detach()
    assert maps.shape == (3, 16, 7, 7) and len(model.query_names) == 16
    assert model.query_names[: len(LABELS)] == list(LABELS)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(3, 16))
    named = Reporter(model, processor, precision="float32").attention(IMAGES[1])
    np.testing.assert_allclose(named["Edema"], maps[1, LABELS.index("Edema")], rtol=1e-4)
    with pytest.raises(UserError, match="no attention maps"):
        make_model("mlp")[0].attention_maps(**images)


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("swin_tiny_patch4_window7_224", (56, 84)), ("swin_tiny_patch4_window7_224", 56), ("swinv2_tiny_window8_256", 64)],
)
def test_any_swin_and_any_shape_of_image(tiny_tokenizer, architecture, size, tmp_path):
    from transformers import Qwen3Config

    config = LightMedVLMConfig(
        vision={
            "architecture": architecture,
            "arguments": {"img_size": size, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
        },
        text=Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1),
        connector={"name": "sasa", "num_queries": 15, "key_positions": True, "conv_norm": "group"},
    )
    model = LightMedVLM(config).eval()
    processor = Processor(tiny_tokenizer, size, (0.5,) * 3, (0.25,) * 3, model.connector.num_output_tokens)
    images = processor.images([[IMAGES[0]]])
    height, width = (size, size) if isinstance(size, int) else size
    assert images["pixel_values"].shape == (1, 1, 3, height, width)
    assert model.grid == (math.ceil(height / 8), math.ceil(width / 8))
    assert model.attention_maps(**images).shape == (1, 15, *model.grid)
    model.save_pretrained(tmp_path)  # here the output head is not tied to the embedding
    loaded = LightMedVLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_the_same_loss_whatever_saves_time_or_memory(make_model):
    model, processor = make_model()
    batch = training_batch(processor)

    def loss_and_gradient(step=model):
        model.zero_grad()
        loss = step(**batch).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return loss.detach(), torch.stack([g.norm() for g in gradients])

    expected = loss_and_gradient()
    model.set_attn_implementation("eager")
    assert model.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(loss_and_gradient(), expected)
    model.set_attn_implementation("sdpa")
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.MultiheadAttention | DropPath):
            module.p = module.dropout = module.drop_prob = 0.0
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # or checkpointing would count each batch twice
    expected = loss_and_gradient()
    model.activation_checkpointing_enable()
    assert any(layer.gradient_checkpointing for layer in model.language_model.model.layers)
    assert model.vision_encoder.layers[0].grad_checkpointing
    torch.testing.assert_close(loss_and_gradient(), expected)
    model.activation_checkpointing_disable()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradient(compiled), expected)


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


def with_random_lora(make_model):
    model, processor = make_model()
    lora.add(model.language_model, rank=4, dropout=0.0)
    for name, parameter in model.language_model.named_parameters():
        if lora.is_lora(name):
            torch.nn.init.normal_(parameter)
    return model.eval(), processor


def test_merged_lora_computes_the_same_and_leaves_a_plain_language_model(make_model, tmp_path):
    model, processor = with_random_lora(make_model)
    batch = processor(IMAGES)
    before = model(**batch).logits
    names = set(make_model()[0].state_dict())
    torch.testing.assert_close(model.merge_lora()(**batch).logits, before, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists()
    assert torch.equal(LightMedVLM.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)


def test_peft_itself_reads_the_adapter(make_model, tmp_path):
    from peft import PeftModel

    model, processor = with_random_lora(make_model)
    ids = processor.for_generation(["effusion"])["input_ids"]
    expected = model.language_model(ids).logits
    model.save_pretrained(tmp_path)
    plain = make_model()[0].language_model
    assert not torch.allclose(plain(ids).logits, expected)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(ids).logits, expected)


def test_the_auto_classes_know_the_model(make_model, tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    model, processor = make_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = model(**processor(IMAGES)).logits
    assert type(AutoConfig.from_pretrained(tmp_path)) is LightMedVLMConfig
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is Processor
    for auto in (AutoModel, AutoModelForImageTextToText):
        assert torch.equal(auto.from_pretrained(tmp_path)(**loaded(IMAGES)).logits, expected)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.language_model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="load_in_8bit"):
        AutoModel.from_pretrained(tmp_path, load_in_8bit=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert loaded(IMAGES[:1], ["Is there an effusion?"])["input_ids"].shape[0] == 1


def test_a_checkpoint_that_is_nowhere_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="nor could it be downloaded"):
        LightMedVLM.from_pretrained("someone/some-model")


@pytest.mark.parametrize(("connector", "with_lora"), [("sasa", True), ("mlp", False)])
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
