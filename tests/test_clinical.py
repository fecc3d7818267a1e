"""Clinical metrics with tiny models of the same classes: what is scored, what is refused, and with which sentence."""

import json
import sys
import tarfile
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS

from lightmedvlm_utils.data.chexbert import chexbert_labels
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import clinical, metrics
from lightmedvlm_utils.evaluation.clinical import CLINICAL_METRICS, clinical_draws
from lightmedvlm_utils.evaluation.scorers import ReportScorer

REFERENCES = ["no effusion .", "the heart is large .", "small edema .", "no edema . small effusion .", "the heart"]
HYPOTHESES = ["no effusion .", "no edema .", "the heart is large .", "small effusion .", "the heart is large"]
# Row 0 is the point estimate; row 1 + i draws study i alone, so that the draws show every study's score.
EACH = np.vstack([np.ones(5), np.eye(5)])


@pytest.fixture(scope="module")
def radeval():
    """RadEval's modules as we import them, where it is installed."""
    need("radeval")
    return clinical._radeval


def need(package):
    if find_spec(package) is None:
        pytest.skip(f"{package} (extra `clinical`) is not installed")


def draws_of(name, models, references=REFERENCES, hypotheses=HYPOTHESES, weights=EACH):
    draws, refused = clinical_draws([name], references, hypotheses, weights, models)
    assert not refused, refused
    for by_metric in draws.values():
        for metric, values in by_metric.items():
            assert values.shape == (len(weights),), metric
    return draws


# -------------------------------------------------------------------------------------- what every metric promises


def test_the_draws_are_means_of_the_studies_that_have_a_score():
    scores = [0.2, None, 1.0, float("nan"), 0.3]
    draws = clinical._study_mean("metric", scores, EACH)
    assert draws["metric"][0] == pytest.approx(0.5)
    np.testing.assert_allclose(draws["metric"][1:], [0.2, np.nan, 1.0, np.nan, 0.3])
    assert draws["metric_unscored"].tolist() == [2, 0, 1, 0, 1, 0]
    assert set(clinical._study_mean("metric", [0.5] * 5, EACH)) == {"metric"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((["radgraf"],), "no clinical metric 'radgraf'; did you mean 'radgraph'"),
        (("bertscore",), r"must be a list: \['bertscore'\]"),
        ((["green"], {"green-7b": "x"}), "no model of a clinical metric 'green-7b'; did you mean 'green-radllama2-7b'"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        clinical.check_clinical(*arguments)
    with pytest.raises(UserError, match=sentence):
        ReportScorer(REFERENCES, range(5), samples=2, clinical=arguments[0], clinical_models=dict(*arguments[1:]))


def test_a_missing_package_costs_only_its_own_metrics(chexbert_file, monkeypatch):
    for package in ("radeval", "bert_score"):
        monkeypatch.setitem(sys.modules, package, None)  # as Python finds a package that is not there
    draws, refused = clinical_draws(
        list(CLINICAL_METRICS), REFERENCES, HYPOTHESES, EACH, {"chexbert": chexbert_file}, dataset="openi"
    )
    assert set(draws) == {"chexbert_uncertain_positive", "chexbert_uncertain_negative"}
    assert set(refused) == set(CLINICAL_METRICS) - {"chexbert"}
    assert refused["bertscore"] == (
        "BERTScore cannot run: the package bert_score is not installed; pip install 'bert-score>=0.3.13'."
    )
    assert all("pip install 'radeval>=2.2.1,<3'." in refused[name] for name in set(refused) - {"bertscore"})


@pytest.mark.parametrize("name", [name for name, metric in CLINICAL_METRICS.items() if metric.models])
def test_missing_models_are_named_with_source_and_place(name, tmp_path, monkeypatch, capfd):
    metric = CLINICAL_METRICS[name]
    if metric.package:
        need(metric.package)
    if name == "ratescore":
        medspacy_works()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    if metric.package == "radeval":
        monkeypatch.setattr(clinical._radeval("radgraph._vendor.core"), "CACHE_DIR", str(tmp_path))
    for models in ({}, dict.fromkeys(metric.models, tmp_path / "absent")):
        _, refused = clinical_draws([name], REFERENCES, HYPOTHESES, EACH, models)
        sentence = refused[name]
        missing = next(model for model in metric.models if clinical.MODELS[model].repository in sentence)
        assert f"clinical_models={{'{missing}': PATH}}" in sentence and sentence.endswith(".")
        assert str(tmp_path / "absent") in sentence if models else "cannot be downloaded" in sentence
    assert "downloading" not in capfd.readouterr().out  # the tests are offline


def test_reports_of_mimic_leave_the_machine_by_no_metric():
    for dataset, sentence in (("mimic", "PhysioNet's terms"), ("MIMIC-CXR", "PhysioNet's terms"), ("", "dataset=")):
        draws, refused = clinical_draws(["crimson_hosted"], REFERENCES, HYPOTHESES, EACH, dataset=dataset)
        assert not draws and sentence in refused["crimson_hosted"]
    assert [name for name, metric in CLINICAL_METRICS.items() if metric.hosted] == ["crimson_hosted"]


# --------------------------------------------------------------------------------------------- CheXbert, the scorer


@pytest.fixture
def random_chexbert(chexbert_file):
    """One that answers by the text: its weights are random and large."""
    content = torch.load(chexbert_file, weights_only=True)
    torch.manual_seed(0)
    for tensor in content["model_state_dict"].values():
        if tensor.ndim == 2:
            tensor.normal_()
    torch.save(content, chexbert_file)
    return chexbert_file


def test_chexbert_f1_is_label_f1_of_its_labels(random_chexbert):
    draws = draws_of("chexbert", {"chexbert": random_chexbert})
    truth, guess = (chexbert_labels(texts, random_chexbert) for texts in (REFERENCES, HYPOTHESES))
    for rule in ("positive", "negative"):
        expected = metrics.label_f1(truth, guess, rule)
        found = draws[f"chexbert_uncertain_{rule}"]
        kinds = ("macro_f1", "micro_f1", "macro_f1_5", "micro_f1_5")
        values = (expected.macro, expected.micro, expected.macro_5, expected.micro_5)
        assert [found[f"chexbert_{kind}"][0] for kind in kinds] == pytest.approx(values) and values[0] < 1
    for same in draws_of("chexbert", {"chexbert": random_chexbert}, hypotheses=REFERENCES).values():
        assert all(values[0] == 1 for values in same.values())


def test_the_scorer_records_what_ran_and_lists_what_did_not(random_chexbert):
    asked = {"clinical": ["chexbert", "crimson_hosted"], "clinical_models": {"chexbert": random_chexbert}}
    scorer = ReportScorer(REFERENCES, range(5), samples=20, dataset="mimic", **asked)
    assert not scorer.refused
    rows = scorer.records("model", HYPOTHESES)
    (row,) = [
        row for row in rows if (row["metric"], row["protocol"]) == ("chexbert_micro_f1", "chexbert_uncertain_positive")
    ]
    assert 0 < row["value"] < 1 and row["low"] <= row["value"] <= row["high"] and row["n"] == 5
    assert list(scorer.refused) == ["crimson_hosted"] and "PhysioNet" in scorer.refused["crimson_hosted"]
    gaps = scorer.difference("same", HYPOTHESES, HYPOTHESES)
    assert {row["value"] for row in gaps if row["metric"] == "chexbert_micro_f1"} == {0}
    assert not any("chexbert" in row["metric"] for row in scorer.reference_records())


# -------------------------------------------------------------------------------------------------- BERTScore


@pytest.fixture
def roberta(tmp_path):
    """A tiny RoBERTa with a byte-level tokenizer, as distilroberta-base is stored."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import RobertaConfig, RobertaModel

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    folder = tmp_path / "distilroberta-base"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    about = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 64, "cls_token": "<s>", "sep_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | names))
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=6, num_attention_heads=2,
        intermediate_size=32, initializer_range=1.0, max_position_embeddings=66,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    return folder


def test_bertscore_is_the_package_s_own(roberta):
    need("bert_score")
    from bert_score import BERTScorer
    from transformers import AutoTokenizer

    models = {"distilroberta-base": roberta}
    (draws,) = draws_of("bertscore", models).values()
    own = BERTScorer(model_type=str(roberta), num_layers=5)
    own._tokenizer = AutoTokenizer.from_pretrained(roberta, add_prefix_space=True)
    # transformers 4 read the first word as any other, with a space before it; so must we, or all scores shift.
    assert own._tokenizer.encode("edema") == AutoTokenizer.from_pretrained(roberta).encode(" edema")
    baseline = 0.8473319  # of distilroberta-base, layer 5, F
    scores = (own.score(HYPOTHESES, REFERENCES)[2].numpy() - baseline) / (1 - baseline)
    np.testing.assert_allclose(draws["bertscore"][1:], scores, atol=1e-4)
    assert draws["bertscore"][0] == pytest.approx(scores.mean(), abs=1e-4)
    assert scores[0] == pytest.approx(1, abs=1e-4) and scores[1:].max() < 0.99

    texts = ["", "no edema .", " \n", "small  edema\n.", ""]
    (draws,) = draws_of("bertscore", models, texts, ["no edema .", "", "edema", "small edema .", ""]).values()
    nothing = -baseline / (1 - baseline)
    np.testing.assert_allclose(draws["bertscore"][1:], [nothing, nothing, nothing, 1, nothing], atol=1e-4)


# ----------------------------------------------------------------------------------------- RadGraph and RadCliQ


def tiny_bert(folder, kind="BertModel", **options):
    """A tiny random BERT, saved with its tokenizer."""
    import transformers

    words = [*WORDS.split(), "a", "b", "1", "2"]  # RadGraph asks the tokenizer for the last four
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=1.0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 512}')
    return folder


@pytest.fixture
def make_radgraph(tmp_path, radeval, monkeypatch):
    """A factory of tiny random RadGraphs: the folder that its archive unpacks to."""
    core = radeval("radgraph._vendor.core")
    monkeypatch.setattr(core, "CACHE_DIR", str(tmp_path / "no cache"))
    encoder = tiny_bert(tmp_path / "encoder")
    bert = {"type": "pretrained_transformer_mismatched", "model_name": str(encoder), "max_length": 512}
    options = {"spans_per_word": 0.5, "max_antecedents": 2}
    events = {
        "trigger_spans_per_word": 0.3,
        "argument_spans_per_word": 0.8,
        "loss_weights": {"trigger": 1.0, "arguments": 1.0},
    }
    model = {
        "type": "dygie", "embedder": {"token_embedders": {"bert": bert}}, "initializer": {}, "module_initializer": {},
        "feature_size": 4, "max_span_width": 2, "target_task": "ner",
        "loss_weights": {"ner": 1.0, "relation": 1.0, "coref": 0.0, "events": 0.0},
        "feedforward_params": {"num_layers": 1, "hidden_dims": 8, "dropout": 0.0},
        "modules": {"ner": {}, "relation": {"spans_per_word": 0.9}, "coref": options, "events": events},
    }  # fmt: skip

    def make(name):
        folder = tmp_path / "models" / name
        (folder / "vocabulary").mkdir(parents=True)
        (folder / "vocabulary" / "non_padded_namespaces.txt").write_text("*labels\n*tags\n")
        (folder / "vocabulary" / f"{name}__ner_labels.txt").write_text("\nANAT-DP\nOBS-DP\nOBS-DA\n")
        (folder / "vocabulary" / f"{name}__relation_labels.txt").write_text("\nmodify\nlocated_at\n")
        config = {"dataset_reader": {"max_span_width": 2, "token_indexers": {"bert": bert}}, "model": model}
        (folder / "config.json").write_text(json.dumps(config))

        def build(**arguments):  # the package builds the model and then reads its weights: save them in between
            torch.manual_seed(3)
            built = dygie.DyGIE(**arguments)
            torch.save(built.state_dict(), folder / "weights.th")
            return built

        dygie = core.dygie
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core, "dygie", SimpleNamespace(DyGIE=build))
            core.RadGraph(model_type=name, model_cache_dir=str(folder.parent))
        return folder

    return make


def test_radgraph_f1_is_the_package_s_own_at_every_level(make_radgraph, radeval, tmp_path, monkeypatch):
    folder = make_radgraph("radgraph-xl")
    references, hypotheses = [*REFERENCES[:4], ""], [*HYPOTHESES[:4], "no edema ."]
    draws = draws_of("radgraph", {"radgraph-xl": folder}, references, hypotheses)
    own = radeval("radgraph").F1RadGraph("all", model_type="radgraph-xl", model_cache_dir=str(folder.parent))
    means, scores, *_ = own(refs=references, hyps=hypotheses)
    assert list(draws) == [f"radgraph-xl_{level}" for level in ("simple", "partial", "complete")]
    for found, mean, per_study in zip(draws.values(), means, scores, strict=True):
        assert found["radgraph_f1"][1:].tolist() == per_study
        assert found["radgraph_f1"][0] == pytest.approx(mean)
        assert per_study[0] == 1 and per_study[4] == 0 and len(set(per_study)) > 2

    with tarfile.open(tmp_path / "radgraph-xl.tar.gz", "w:gz") as archive:
        for path in folder.iterdir():
            archive.add(path, path.name)
    monkeypatch.setattr(radeval("radgraph._vendor.core"), "CACHE_DIR", str(folder.parent))
    for models in ({"radgraph-xl": tmp_path / "radgraph-xl.tar.gz"}, {}):  # packed, or unpacked earlier by the package
        again = draws_of("radgraph", models, references, hypotheses)
        assert all(np.array_equal(again[level]["radgraph_f1"], draws[level]["radgraph_f1"]) for level in draws)
    _, refused = clinical_draws(["radgraph"], references, hypotheses, EACH, {"radgraph-xl": tmp_path / "encoder"})
    assert "holds no folder radgraph-xl" in refused["radgraph"]


def test_radcliq_is_the_package_s_own_without_idf(make_radgraph, radeval, random_chexbert, roberta, monkeypatch):
    from transformers import BertConfig, BertModel, BertTokenizer

    need("bert_score")
    folder = make_radgraph("radgraph")
    models = {"radgraph": folder, "chexbert": random_chexbert, "distilroberta-base": roberta}
    (draws,) = draws_of("radcliq", models).values()

    class TinyCheXbert(radeval("_chexbert_base").BaseCheXbertEvaluator):
        def __init__(self, device):
            super().__init__()
            state = torch.load(random_chexbert, weights_only=True)["model_state_dict"]
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
            bert = BertModel(
                BertConfig(vocab_size=len(WORDS.split()), hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
                           intermediate_size=32, max_position_embeddings=512)
            )  # fmt: skip
            labeler = radeval("_chexbert_base").BaseBertLabeler(
                device="cpu", backbone=bert, num_4way_heads=13, state_dict=state
            )
            tokenizer = BertTokenizer.from_pretrained(random_chexbert.parent)
            self._init_evaluator(model=labeler.eval(), tokenizer=tokenizer, device="cpu", batch_size=2)

    radcliq, bertscore = radeval("RadCliQv1.radcliq"), radeval("bertscore._vendor")
    graph, bert = radcliq.RadGraph, bertscore.BERTScorer
    baseline = f"{bertscore.__path__[0]}/rescale_baseline/en/distilroberta-base.tsv"
    local = {"model_type": str(roberta), "baseline_path": baseline, "idf": False, "idf_sents": None}
    monkeypatch.setattr(radcliq, "F1CheXbert", TinyCheXbert)
    monkeypatch.setattr(radcliq, "RadGraph", partial(graph, model_cache_dir=str(folder.parent)))
    monkeypatch.setattr(bertscore, "BERTScorer", lambda **options: bert(**options | local))
    inverse, scores = radcliq.CompositeMetric().predict(REFERENCES, HYPOTHESES)
    np.testing.assert_allclose(draws["radcliq_v1"][1:], scores, atol=1e-4)
    assert draws["inverse_radcliq_v1"][0] == pytest.approx(inverse, abs=1e-3)
    assert draws["semb_score"][1] == pytest.approx(1) and draws["radgraph_combined"][1] == 1
    assert draws["radcliq_v1"][1:].argmin() == 0  # lower is better, and only study 0 is the same on both sides


# ---------------------------------------------------------------------------------- RaTEScore, GREEN, CRIMSON


def medspacy_works():
    try:
        clinical._ratescore("scorer")
    except UserError as error:
        pytest.skip(str(error))


def test_ratescore_is_the_package_s_own_and_loses_no_study(radeval, tmp_path):
    medspacy_works()
    labels = ["O", "B-ANATOMY", "I-ANATOMY", "B-DISEASE", "I-DISEASE", "B-ABNORMALITY", "I-ABNORMALITY"]
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    entities = tiny_bert(tmp_path / "entities", "BertForTokenClassification", **named)
    places = [str(entities), str(tiny_bert(tmp_path / "synonyms"))]
    models = dict(zip(("rate-ner-deberta", "biolord-2023-c"), places, strict=True))
    (draws,) = draws_of("ratescore", models).values()
    scores = radeval("RaTEScore.scorer").RaTEScore(*places).compute_score(HYPOTHESES, REFERENCES)[0]
    np.testing.assert_allclose(draws["ratescore"][1:], scores, atol=1e-6)
    assert draws["ratescore"][1] == pytest.approx(1) and len(set(np.round(scores, 4))) > 2

    references, hypotheses = ["", *REFERENCES[1:]], [*HYPOTHESES[:3], "a.", HYPOTHESES[4]]
    (holes,) = draws_of("ratescore", models, references, hypotheses).values()
    np.testing.assert_allclose(holes["ratescore"][1:], [0.5, *scores[1:3], 0.5, scores[4]], atol=1e-6)


def talker(folder, answers, otherwise):
    """A tiny Llama that says the answer of the word it was shown, else `otherwise`, and stops.

    Its one layer attends to all tokens alike, so that its last state holds the last token and a trace of every other.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<unk>", "</s>", "<|assistant|>", *answers, otherwise, *answers.values()]
    vocabulary += ["<pad>"] * (len(vocabulary) % 2)  # an even size, for rotary positions
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>", model_max_length=100_000
    )
    tokenizer.chat_template = "{% for m in messages %} {{ m['content'] }} {% endfor %} <|assistant|>"
    tokenizer.save_pretrained(folder)
    size = len(vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=size, hidden_size=size, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1, max_position_embeddings=100_000, eos_token_id=ids["</s>"], bos_token_id=None)
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.ndim == 1 else weight.zero_()
        attention = model.model.layers[0].self_attn
        for weight in (model.model.embed_tokens.weight, attention.v_proj.weight, attention.o_proj.weight):
            weight.copy_(torch.eye(size))
        head = model.lm_head.weight
        head[ids[otherwise], ids["<|assistant|>"]] = 10
        for word, answer in answers.items():
            head[ids[answer], ids["<|assistant|>"]] = 9
            head[ids[answer], ids[word]] = 1e6
        for answer in (otherwise, *answers.values()):
            head[ids["</s>"], ids[answer]] = 1e10
    model.save_pretrained(folder)
    return folder


REPORTS = [f"there is {word} ." for word in ("alpha", "nothing", "beta", "alpha", "nothing")]


def test_green_reads_counts_in_the_order_of_studies(radeval, tmp_path):
    import multiprocessing

    counted = "[Clinically Significant Errors]:\n(a) False report: {}. Edema.\n\n[Matched Findings]:\n{}. Heart; lungs."
    answers = {"alpha": counted.format(1, 3), "beta": counted.format(0, 2)}
    started = multiprocessing.get_start_method(allow_none=True)
    models = {"green-radllama2-7b": talker(tmp_path / "green", answers, "[Matched Findings]:\nNone.")}
    (draws,) = draws_of("green", models, REPORTS, REPORTS).values()
    assert draws["green"][1:].tolist() == [0.75, 0, 1, 0.75, 0]
    assert draws["green"][0] == pytest.approx(0.5)
    assert draws["green_unread"].tolist() == [2, 0, 1, 0, 0, 1]
    assert multiprocessing.get_start_method(allow_none=True) == started  # importing GREEN sets it


def test_crimson_counts_what_its_model_did_not_answer(radeval, tmp_path):
    finding = [{"id": "R1", "finding": "edema", "clinical_significance": "urgent"}]
    agreed = {"reference_findings": finding, "predicted_findings": [{**finding[0], "id": "P1"}]}
    agreed |= {"matched_findings": [{"ref_id": "R1", "pred_id": "P1"}], "errors": {}}
    missed = {"reference_findings": finding, "predicted_findings": [], "matched_findings": []}
    missed |= {"errors": {"missing_findings": ["R1"]}}
    answers = {"alpha": json.dumps(agreed), "beta": json.dumps(missed)}
    models = {"medgemma-4b-it-crimson": talker(tmp_path / "crimson", answers, "I cannot say.")}
    (draws,) = draws_of("crimson", models, REPORTS, REPORTS).values()
    np.testing.assert_allclose(draws["crimson"], [2 / 3, 1, np.nan, 0, 1, np.nan])
    assert draws["crimson_unscored"].tolist() == [2, 0, 1, 0, 0, 1]
