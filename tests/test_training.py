"""Each stage changes what it should and nothing else, and the next one starts where it ended."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lightmedvlm_utils.config import StageSettings
from lightmedvlm_utils.course import stages
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.learning.checkpoints import Checkpoints
from lightmedvlm_utils.learning.examples import disease_targets, question_examples, report_examples
from lightmedvlm_utils.learning.features import FeatureStore, ImageStore, encode_studies
from lightmedvlm_utils.learning.loop import (
    batches,
    learning_rate,
    make_batch,
    prepare_stage,
    train,
    warm_up_diseases,
)
from lightmedvlm_utils.model import lora
from lightmedvlm_utils.model.modeling import PARTS, LightMedVLM
from lightmedvlm_utils.observations import LABELS
from lightmedvlm_utils.settings import resolve

STAGES = {
    1: StageSettings(2, 2, connector_lr=1e-3, disease_loss=1.0),
    2: StageSettings(2, 2, ("connector", "lora"), connector_lr=1e-3, lora_lr=1e-3, disease_loss=1.0),
    3: StageSettings(2, 2, ("connector", "lora"), connector_lr=1e-3, lora_lr=1e-3, disease_loss=1.0),
}
LEARNS = {1: {"connector"}, 2: {"connector", "language_model"}, 3: {"connector", "language_model"}}


@pytest.fixture
def studies():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.choice([1.0, 0.0, -1.0, np.nan], (5, len(LABELS))), columns=list(LABELS))
    reports = [f"Findings: There is {'no' if i % 2 else 'a'} left pleural effusion." for i in range(5)]
    return frame.assign(study_id=range(100, 105), report=reports)


@pytest.fixture
def store(studies):
    return FeatureStore(studies.study_id, [torch.randn(5, 7, 7, 16).half()])


def parts(model):
    return {part: {n: v.clone() for n, v in getattr(model, part).state_dict().items()} for part in PARTS}


def changed(before, after):
    return {p for p in PARTS if any(not torch.equal(v, after[p][n]) for n, v in before[p].items())}


def test_every_stage_trains_its_parts_and_the_next_starts_from_them(make_model, studies, store, tmp_path):
    model, processor = make_model()
    frozen_llm = parts(model)["language_model"]
    questions = pd.DataFrame({"study_id": studies.study_id, "question": "Is there an effusion?", "answer": "yes"})
    for number, settings in STAGES.items():
        prepare_stage(model, settings, rank=4, alpha=8, dropout=0.0)
        before = parts(model)
        reports = report_examples(studies, processor)
        examples = reports if number < 3 else question_examples(questions, studies, processor)
        history = train(model, processor, examples, store, settings, reports[:2], log=lambda line: None)
        assert changed(before, parts(model)) == LEARNS[number]
        assert history[0]["epoch"] == 0 and np.isfinite(history[-1]["validation_loss"])
        if number == 1:  # bit-identical, not nearly so
            assert all(torch.equal(v, frozen_llm[n]) for n, v in model.language_model.state_dict().items())
        else:  # LoRA beside the weights, never in them
            weights = {n.replace(".base_layer", ""): v for n, v in model.language_model.state_dict().items()}
            assert all(torch.equal(weights[name], value) for name, value in frozen_llm.items())
        model.save_pretrained(tmp_path / str(number))
        final = model.state_dict()
        model = LightMedVLM.from_pretrained(tmp_path / str(number))
        assert set(model.state_dict()) == set(final)
        assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())
    assert lora.has_lora(model.language_model)


def test_training_lowers_the_loss_and_repeats_exactly(make_model, studies, store):
    settings = replace(STAGES[2], epochs=20, connector_lr=1e-2, lora_lr=1e-2)
    histories = []
    for _ in range(2):
        model, processor = make_model()
        prepare_stage(model, settings, rank=4, alpha=8, dropout=0.0)
        examples = report_examples(studies, processor)
        histories.append(train(model, processor, examples, store, settings, examples, log=lambda line: None))
    assert histories[0] == histories[1]
    assert histories[0][-1]["validation_loss"] < 0.95 * histories[0][0]["validation_loss"]


def test_an_epoch_shows_every_example_once(make_model, studies, store):
    _, processor = make_model()
    examples = report_examples(studies, processor)
    seen = [batch["image_features"][0] for batch in batches(examples, store, processor, 2, np.random.default_rng(0))]
    assert sorted(torch.cat(seen)[:, 0, 0, 0].tolist()) == sorted(store.stages[0][:, 0, 0, 0].float().tolist())


def test_disease_targets_keep_uncertain_apart():
    states = np.array([[1.0, 0.0, -1.0, np.nan]])
    assert disease_targets(states).tolist() == [[1.0, 0.0, 0.5, 0.0]]
    assert disease_targets(None).isnan().all()


def test_studies_without_labels_teach_their_questions_alone(make_model, studies, store):
    """A published VQA set has no labels: its studies lie beside the run's own and move no disease query by a loss."""
    model, processor = make_model()
    others = pd.DataFrame({"study_id": [-1, -2]})
    both = store.joined(FeatureStore(others.study_id, [torch.randn(2, 7, 7, 16).half()]))
    assert torch.equal(both([-2, 100])["image_features"][0][1], store([100])["image_features"][0][0])
    questions = pd.DataFrame({"study_id": [-1, -2], "question": "Which side?", "answer": ["left", "right"]})
    examples = question_examples(questions, others, processor)
    batch = make_batch(examples, both, processor)
    assert model.disease_loss(batch["image_features"], batch["known"]) == 0
    history = train(model, processor, examples, both, STAGES[1], examples, log=lambda line: None)
    assert np.isfinite(history[-1]["validation_loss"])


def test_the_schedule_rises_to_its_peak_and_falls_to_its_end():
    settings = StageSettings(1, 1, connector_lr=1e-3, final_lr=1e-6, warmup=0.1)
    rates = [learning_rate(step, 100, 1e-3, settings) for step in range(101)]
    assert max(rates) == pytest.approx(1e-3) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(1e-6)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_features_survive_the_disk(store, tmp_path):
    store.save(tmp_path / "features.safetensors")
    loaded = FeatureStore.load(tmp_path / "features.safetensors")
    ids = [104, 100]
    assert torch.equal(loaded(ids)["image_features"][0], store(ids)["image_features"][0])


def test_stored_features_are_what_the_encoder_gives(make_model, tmp_path):
    from PIL import Image

    model, processor = make_model()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    studies = pd.DataFrame({"study_id": range(3), "images": [[{"path": str(tmp_path / f"{i}.png")}] for i in range(3)]})
    store = encode_studies(model, processor, studies, batch_size=2)
    direct = model.encode_images(**processor.images([[str(tmp_path / "2.png")]]))
    stored = store([2])["image_features"][0].flatten(1, 2)
    torch.testing.assert_close(stored, direct.detach(), atol=2e-3, rtol=2e-3)


def test_warm_up_teaches_sasa_alone_to_say_the_states(make_model):
    model, processor = make_model()
    torch.manual_seed(0)
    model.connector.state_words.normal_()  # a random model's own words hardly differ
    studies = pd.DataFrame({"study_id": range(8), "report": "", **{label: [0.0, 1.0] * 4 for label in LABELS}})
    features = torch.randn(2, 7, 7, 16).repeat(4, 1, 1, 1)  # two kinds of study, with and without all findings
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = StageSettings(1, 2, disease_warmup=30)
    examples, store = report_examples(studies, processor), FeatureStore(studies.study_id, [features])
    losses = warm_up_diseases(model, processor, examples, store, settings)
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    logits = model.disease_logits((features[:2],))
    assert (logits[1] > logits[0]).all()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("connector.") for name in moved)
    assert "connector.state_words" not in moved
    for connector in ("mlp", "c-abstractor", "resampler"):
        with pytest.raises(UserError, match="no disease head"):
            warm_up_diseases(make_model(connector)[0], processor, examples, store, settings)


def test_a_stage_of_no_epochs_changes_nothing(make_model, studies, store):
    model, processor = make_model()
    before = parts(model)
    examples = report_examples(studies, processor)
    history = train(model, processor, examples, store, replace(STAGES[1], epochs=0), examples, log=lambda line: None)
    assert not changed(before, parts(model)) and [record["step"] for record in history] == [0]


@pytest.mark.parametrize("number", [1, 2])
def test_micro_batches_learn_what_the_whole_batch_does(make_model, studies, store, number):
    """The loss is a mean over the batch's supervised tokens, whatever part of it fits into memory at once."""
    reports = studies.assign(report=[f"{text} {'Heart size is normal. ' * i}" for i, text in enumerate(studies.report)])
    found = {}
    for micro in (0, 1, 2, 3):
        model, processor = make_model(dropout=0.0, conv_norm="group")
        settings = replace(STAGES[number], batch_size=5, micro_batch=micro, epochs=2)
        prepare_stage(model, settings, rank=2, alpha=2, dropout=0.0)
        history = train(model, processor, report_examples(reports, processor), store, settings, log=lambda line: None)
        found[micro] = model.state_dict(), [record for record in history if "loss" in record]
    for micro in (1, 2, 3):
        weights, records = found[micro]
        for one, other in zip(records, found[0][1], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        for name, value in found[0][0].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)  # Adam enlarges the last digits


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_stops_or_is_left_out(make_model, studies, store, tmp_path, bad):
    store.stages[0][3, 0, 0, 0] = bad
    states, examples = Checkpoints(tmp_path, "this", 0), None
    for choice in ("stop", "skip"):
        model, processor = make_model()
        examples = report_examples(studies, processor)
        settings = replace(STAGES[1], batch_size=1, not_finite=choice)
        prepare_stage(model, settings, rank=2, alpha=2, dropout=0.0)
        options = dict(log=lambda line: None, checkpoints=states if choice == "stop" else None)
        if choice == "stop":
            with pytest.raises(UserError, match=r"step \d+ is not finite \(studies 103\)"):
                train(model, processor, examples, store, settings, **options)
            tensors, _ = states.load()
            assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
        else:
            history = train(model, processor, examples, store, settings, **options)
            assert sum("skipped" in record for record in history) == 2, "once an epoch"
            assert all(value.isfinite().all() for value in model.state_dict().values())


def test_features_are_of_no_use_behind_a_stage_that_trained_the_encoder(
    make_model, studies, store, tmp_path, monkeypatch
):
    model, processor = make_model()
    studies = studies.assign(images=[[{"path": "film.jpg", "view": "PA"}]] * len(studies))
    store.save(tmp_path / "features.safetensors")
    monkeypatch.setattr(stages, "image_cache", lambda *_: None)
    for learns, kinds in ((["connector"], "fff"), (["vision", "connector"], "iii")):
        profile = resolve("smoke", {"stage1.learns": learns})
        step = SimpleNamespace(profile=profile, path=lambda *_: tmp_path / "features.safetensors")
        found = [stages.image_store(step, number, studies, model, processor) for number in (1, 2, 3)]
        assert [type(one) for one in found] == [{"f": FeatureStore, "i": ImageStore}[kind] for kind in kinds]
    profile = resolve("smoke", {"stage2.learns": ["vision", "lora"]})
    step = SimpleNamespace(profile=profile, path=step.path)
    found = [stages.image_store(step, number, studies, model, processor) for number in (1, 2, 3)]
    assert [isinstance(one, ImageStore) for one in found] == [False, True, True]
