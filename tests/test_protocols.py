"""The two protocols: what R2Gen's handling does to texts, how often a study counts, what is recorded of it."""

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from lightmedvlm_utils.config import PROFILES
from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.data.reports import clean_reports
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.evaluation.modelcard import model_card
from lightmedvlm_utils.evaluation.protocols import UNKNOWN, R2Gen
from lightmedvlm_utils.evaluation.scorers import ReportScorer
from lightmedvlm_utils.phantom.patients import sample_patients
from lightmedvlm_utils.phantom.reports import write_report

TRAIN = ["Findings: Lungs are clear. No effusion. Impression: Normal."] * 10


@pytest.fixture(scope="module")
def reports():
    """160 phantom reports, some without an impression; patients; images."""
    rng = np.random.default_rng(0)
    studies = [study for patient in sample_patients(130, 0) for study in patient.studies]
    table = clean_reports([write_report(study, rng) for study in studies])
    usable = np.flatnonzero(table["findings"] != "")[:160]
    assert (table["impression"][usable] == "").any()
    return (
        table["report"].iloc[usable].tolist(),
        [studies[i].subject_id for i in usable],
        [len(studies[i].views) for i in usable],
    )


@pytest.fixture
def make_scorer(reports):
    def make(**options):
        texts, patients, images = reports
        about = {"samples": 30, "images": images[:80], "train_reports": texts[80:], "r2gen_style": "mimic"}
        return ReportScorer(texts[:80], patients[:80], **{**about, **options})

    return make


def chosen(rows, **wanted):
    return {row["metric"]: row for row in rows if all(row[key] == value for key, value in wanted.items())}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A 1.2-cm nodule.", "a 12-cm nodule ."),
        ("Mass of 3.5 cm, 9/2011. Stable.", "mass of 35 cm 9201stable ."),
        ("Compression of T11. No PTX.", "compression of t1no ptx ."),
        ('1. Clear. 2. "Normal" heart; no edema? 3. Low\\high', "clear . normal heart no edema . lowhigh ."),
        ("Fractures of ribs 4 and 5. Clear.", "fractures of ribs 4 and . clear ."),
        ("Tip <2 cm @ T4: [stable] ~5%", "tip 2 cm t4 stable ~5 ."),
        ("Normal... . Clear", "normal . . clear ."),
        ("", ""),
    ],
)
def test_cleaning_is_that_of_the_family(text, words):
    for style in ("mimic", "iu"):
        assert " ".join(R2Gen(style, TRAIN).words(text)) == words


def test_line_breaks_end_sentences_in_mimic_alone():
    text = "No ___ seen.\n \nHeart.....normal"
    assert R2Gen("mimic", TRAIN).words(text) == ["no", "seen", ".", "heartnormal", "."]
    assert R2Gen("iu", TRAIN).words(text) == ["no", "seen", "heartnormal", "."]


@pytest.mark.parametrize(("style", "threshold", "places"), [("mimic", 10, 100), ("iu", 3, 60)])
def test_vocabulary_and_truncation(style, threshold, places):
    train = ["Findings: known rare " + "word " * 200] * (threshold - 1) + ["Findings: known. Impression: rare"]
    r2gen = R2Gen(style, train)
    assert r2gen.vocabulary == {"known", "word", "."} - ({"."} if threshold > len(train) else set())
    assert r2gen.reference("Findings: Known, rare. Impression: Word.") == f"known {UNKNOWN} ."
    assert r2gen.hypothesis("Known, rare <unk>.") == "known rare unk ."
    long = "word " * 200
    assert len(r2gen.reference(long).split()) == places - 1  # the start token has the first place
    assert len(r2gen.hypothesis(long).split()) == places
    assert r2gen.hypothesis("Impression: Normal.") == ""


@pytest.mark.parametrize("style", ["mimic", "iu"])
def test_scores_are_pycocoevalcaps_own(reports, make_scorer, style):
    texts, _, images = reports
    scorer, generated = make_scorer(r2gen_style=style), texts[79::-1]
    r2gen = R2Gen(style, texts[80:])
    times = images[:80] if style == "mimic" else [1] * 80
    items = [i for i, count in enumerate(times) for _ in range(count)]
    expected = {k: [r2gen.reference(texts[i])] for k, i in enumerate(items)}
    proposed = {k: [r2gen.hypothesis(generated[i])] for k, i in enumerate(items)}
    rows = chosen(scorer.records("x", generated), protocol="r2gen", section="findings")
    values = [rows[f"bleu_{k}"]["value"] for k in (1, 2, 3, 4)]
    assert values == pytest.approx(Bleu(4).compute_score(expected, proposed, verbose=0)[0], abs=1e-12)
    for name, theirs in (("rouge_l", Rouge()), ("cider", Cider())):
        assert rows[name]["value"] == pytest.approx(theirs.compute_score(expected, proposed)[0], abs=1e-12)
    assert {row["unit"] for row in rows.values()} == {"image" if style == "mimic" else "study"}
    assert {row["n"] for row in rows.values()} == {len(items)}
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())


def test_a_study_with_two_images_counts_twice():
    right, wrong = "Findings: Lungs are clear.", "Findings: No effusion."
    about = {"patients": [1, 2], "samples": 40, "train_reports": TRAIN, "r2gen_style": "mimic"}
    scorer = ReportScorer([right, wrong], images=[2, 1], **about)
    (row,) = [r for r in scorer.records("x", [right, right]) if r["protocol"] == "r2gen" and r["metric"] == "bleu_1"]
    assert (row["n"], row["unit"]) == (3, "image")
    assert row["value"] == pytest.approx(9 / 12)  # all of 2 x 4 words, and the full stop of the third text
    one = ReportScorer([right, wrong], images=[0, 1], **about)
    assert chosen(one.records("x", [wrong] * 2), protocol="r2gen")["bleu_1"]["n"] == 1


def test_study_protocol_is_what_it_was(reports, make_scorer):
    texts = reports[0][:80]
    generated = texts[::-1]
    scorer = make_scorer()
    rows = chosen(scorer.records("x", generated), protocol="study", section="findings+impression")
    tokens = [{i: [" ".join(metrics.words(text))] for i, text in enumerate(side)} for side in (texts, generated)]
    assert [rows[f"bleu_{k}"]["value"] for k in (1, 2, 3, 4)] == pytest.approx(
        Bleu(4).compute_score(*tokens, verbose=0)[0], abs=1e-12
    )
    for name, theirs in (("rouge_l", Rouge()), ("cider", Cider())):
        each = theirs.compute_score(*tokens)[1]
        draws = scorer.weights @ each / scorer.weights.sum(1)
        assert rows[name]["value"] == draws[0]  # to the last digit
        assert [rows[name]["low"], rows[name]["high"]] == np.percentile(draws[1:], [2.5, 97.5]).tolist()
    assert {(row["unit"], row["n"]) for row in rows.values()} == {("study", 80)}


def test_rouge_equals_pycocoevalcap_on_any_words():
    rng = np.random.default_rng(0)
    for _ in range(300):
        pair = [" ".join(rng.choice(list("abcde"), rng.integers(0, 90))) for _ in range(2)]
        assert metrics._rouge_l(*pair) == Rouge().calc_score([pair[1]], [pair[0]])


def test_sections_are_scored_over_the_studies_that_have_them():
    references = ["Findings: Edema. Impression: Edema.", "Findings: Clear.", "Findings: Clear lungs."]
    generated = ["Findings: Clear. Impression: Edema.", "Findings: Clear. Impression: Edema.", "Impression: Edema."]
    rows = ReportScorer(references, [1, 2, 3], samples=50).records("x", generated)
    impression = chosen(rows, section="impression", protocol="study")
    assert impression["bleu_1"]["value"] == pytest.approx(1) and impression["bleu_1"]["n"] == 1
    labelled = chosen(rows, section="impression", protocol="study_uncertain_positive")
    assert labelled["label_micro_f1"]["value"] == 1 and labelled["label_micro_f1"]["low"] == 1
    findings = chosen(rows, section="findings", protocol="study")
    assert findings["mean_words"]["value"] == pytest.approx(2 / 3)  # the third has no findings: an empty text
    assert {row["n"] for row in findings.values()} == {3}
    assert not chosen(rows, protocol="r2gen")


def test_references_say_what_r2gen_takes_off():
    references = ["Findings: Lungs are clear.", "Findings: No pneumothorax. " + "Lungs are clear. " * 40]
    scorer = ReportScorer(
        references, [1, 2], samples=20, images=[1, 1], train_reports=TRAIN, r2gen_style="mimic"
    )  # fmt: skip
    rows = chosen(scorer.reference_records(), protocol="r2gen")
    assert rows["truncated_ratio"]["value"] == 0.5
    assert rows["unknown_ratio"]["value"] == pytest.approx(1 / 103)
    assert rows["mean_words"]["value"] == pytest.approx(103 / 2)


def test_per_study_scores_sum_to_those_of_the_corpus(reports, make_scorer):
    texts = reports[0]
    generated = texts[80:]
    scorer = make_scorer(study_ids=range(500, 580))
    table = scorer.per_study("x", generated)
    assert list(table.columns[:3]) == ["subject_id", "study_id", "system"] and len(table) == 80
    assert (
        table.drop(columns=["subject_id", "study_id", "system"])
        .dtypes.map(lambda kind: kind.kind)
        .isin(["i", "f"])
        .all()
    )
    assert table["study_id"].tolist() == list(range(500, 580)) and set(table["system"]) == {"x"}
    rows = chosen(scorer.records("x", generated), section="findings+impression")
    for name, metric in (("rouge_l", "rouge_l"), ("cider", "cider"), ("words", "mean_words")):
        assert table[name].mean() == pytest.approx(rows[metric]["value"])
    counts = table.filter(like="label_").sum()
    micro = 2 * counts["label_tp"] / (2 * counts["label_tp"] + counts["label_fp"] + counts["label_fn"])
    assert micro == pytest.approx(metrics.label_f1(label_reports(texts[:80]), label_reports(generated)).micro)
    tokens = [{i: [" ".join(metrics.words(text))] for i, text in enumerate(side)} for side in (texts[:80], generated)]
    assert table["bleu_4"].to_numpy() == pytest.approx(Bleu(4).compute_score(*tokens, verbose=0)[1][3], abs=1e-12)


def test_what_cannot_be_compared_is_refused():
    about = {"references": ["Findings: Clear."], "patients": [1], "samples": 5}
    given = {"train_reports": TRAIN, "images": [1], "r2gen_style": "mimic"}
    for wrong, message in (
        ({"r2gen_style": "chexpert"}, "chexpert"),
        ({"train_reports": None}, "train_reports"),
        ({"train_reports": ["Impression: Normal."]}, "vocabulary"),
        ({"images": None}, "number of images"),
        ({"images": [1, 1]}, "1 studies"),
        ({"images": [-1]}, "0 or more"),
        ({"images": [0]}, "nothing to compare"),
        ({"study_ids": [1, 2]}, "2 study_ids"),
    ):
        with pytest.raises(UserError, match=message):
            ReportScorer(**about, **{**given, **wrong})
    with pytest.raises(UserError, match="2 reports"):
        ReportScorer(**about).records("x", ["Clear."] * 2)


def test_the_model_card_counts_studies_and_shows_both_protocols(reports, make_scorer):
    card = model_card(make_scorer().records("sasa", reports[0][80:]), PROFILES["smoke"], "phantom", 80, "sasa")
    assert "Evaluated on 80 held-out studies" in card and "as in R2Gen's tables" in card
