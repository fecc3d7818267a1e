"""Facts: read with side, place and size; scored whatever the words; and the crash test that compares metrics."""

import re
import time

import numpy as np
import pytest

from lightmedvlm_utils.data import changes, facts
from lightmedvlm_utils.data.facts import Fact, compares_with_prior, contradictions, read_facts
from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.data.places import same_zone
from lightmedvlm_utils.data.reports import report_text
from lightmedvlm_utils.evaluation.bootstrap import bootstrap_weights
from lightmedvlm_utils.evaluation.crash import ERRORS, HARMLESS, METRICS, NOTICED, crash_cases, crash_table
from lightmedvlm_utils.evaluation.facts import credit, fact_counts, fact_draws, matched, things
from lightmedvlm_utils.evaluation.modelcard import model_card
from lightmedvlm_utils.evaluation.scorers import ReportScorer
from lightmedvlm_utils.observations import OPACITIES
from lightmedvlm_utils.phantom.patients import sample_patients
from lightmedvlm_utils.phantom.reports import write_findings, write_impression

# Sentence -> what it says of each finding: kind or label, side, zone, grade or millimeters, "no" or "maybe".
SAID = {
    "Left lower lobe collapse with right effusion.": ["Atelectasis left lower", "Pleural Effusion right"],
    "Left pleural effusion and atelectasis.": ["Pleural Effusion left", "Atelectasis left"],
    "Small left and moderate right effusions.": ["Pleural Effusion left small", "Pleural Effusion right moderate"],
    "Effusions, moderate on the right and small on the left, with bibasilar atelectasis.": [
        *("Pleural Effusion right moderate", "Pleural Effusion left small", "Atelectasis both basal")
    ],
    "Right effusion is moderate, left effusion is small.": [
        *("Pleural Effusion right moderate", "Pleural Effusion left small")
    ],
    "Small bilateral effusions, right greater than left.": ["Pleural Effusion both small"],
    "Left > right basal atelectasis.": ["Atelectasis both basal"],
    "Both lung bases show mild atelectasis.": ["Atelectasis both basal mild"],
    "There is a pneumothorax on the left, and the right lung is clear.": ["Pneumothorax left"],
    "The right lung is clear with a small effusion on the left.": ["Pleural Effusion left small"],
    "On the right, there is a large effusion.": ["Pleural Effusion right large"],
    "Small effusion and atelectasis at the left base.": ["Pleural Effusion left basal small", "Atelectasis left basal"],
    "Opacities in the right upper, right lower and left lower lobes, concerning for pneumonia.": [
        *("Lung Opacity right upper", "Lung Opacity right lower", "Lung Opacity left lower"),
        *("maybe Pneumonia right upper", "maybe Pneumonia right lower", "maybe Pneumonia left lower"),
    ],
    "Opacity at the left base consistent with pneumonia.": ["Pneumonia left basal"],
    "Retrocardiac opacity on the left may represent atelectasis or infection.": [
        *("Lung Opacity left lower", "maybe Atelectasis left lower", "maybe Pneumonia left lower")
    ],
    "Right middle lobe and lingular consolidation.": ["Consolidation right mid", "Consolidation left mid"],
    "RUL nodule, 8 mm, and a 3.4 x 2 cm mass in the LLL.": ["nodule right upper 8.0", "mass left lower 34.0"],
    "Left clavicle and right rib fractures.": ["clavicle left", "rib right"],
    "Healed fractures of the right 5th and left 6th ribs.": ["rib right", "rib left"],
    "Apical pleural thickening on the right, calcified left pleural plaque.": [
        *("thickening right apical", "plaque left")
    ],
    "Left pacemaker leads end in the right atrium and right ventricle.": ["pacemaker left"],
    "Left chest tube at the apex, right IJ line in the SVC, ETT above the carina.": [
        *("chest tube left apical", "central line right", "endotracheal tube")
    ],
    "Endotracheal and enteric tubes.": ["endotracheal tube", "nasogastric tube"],
    "The endotracheal tube ends in the right main bronchus.": ["endotracheal tube"],
    "Cholecystectomy clips in the right upper quadrant.": ["clips"],
    "The heart is mildly enlarged with left ventricular prominence.": ["Cardiomegaly mild"],
    "No left pneumothorax, but a tiny right apical pneumothorax.": [
        "no Pneumothorax left",
        "Pneumothorax right apical tiny",
    ],
    "No large effusion.": ["no Pleural Effusion large"],
    "Mild scoliosis and right basilar opacity.": ["Lung Opacity right basal"],
    "Moderate interval increase in the left effusion.": ["Pleural Effusion left"],
    "1. Small left effusion 2) Right pneumothorax": ["Pleural Effusion left small", "Pneumothorax right"],
}


def said(fact: Fact) -> str:
    state = {"absent": "no", "uncertain": "maybe", "present": ""}[fact.state]
    words = (state, fact.kind or fact.finding, fact.side, fact.zone, fact.grade, fact.size_mm)
    return " ".join(str(word) for word in words if word)


@pytest.mark.parametrize("sentence", SAID)
def test_what_a_sentence_says(sentence):
    assert sorted(said(fact) for fact in read_facts(sentence)) == sorted(SAID[sentence])


def test_sections_and_changes_are_kept():
    found = read_facts(
        "Findings: The left effusion has increased. New right basal opacity.\nImpression:\n1. Left effusion.\n2. Edema."
    )
    assert [fact.section for fact in found] == ["findings", "findings", "impression", "impression"]
    assert [fact.change for fact in found] == ["increased", "new", "", ""]


@pytest.mark.parametrize(
    ("sentence", "compares"),
    [
        ("The effusion is unchanged.", True),
        ("Small effusion, larger than on the prior film.", True),
        ("No significant interval change.", True),
        ("No new opacity.", True),
        ("The right hemidiaphragm is higher than the left.", False),
        ("No prior studies are available for comparison.", False),
        ("Increased interstitial markings at the bases.", False),
        ("Prior granulomatous disease; status post prior CABG.", False),
    ],
)
def test_comparisons_with_a_prior(sentence, compares):
    assert compares_with_prior(sentence) == compares


@pytest.mark.parametrize(
    ("text", "contradicts"),
    [
        ("Small left effusion. No pleural effusion.", True),
        ("Findings: Left basal opacity. Impression: Right basal opacity.", True),
        ("Findings: Left effusion. Impression: Bilateral effusions.", True),
        ("Findings: Bilateral effusions. Impression: Left effusion.", False),
        ("Left effusion. No right effusion.", False),
        ("Small left effusion. No large effusion.", False),
        ("Left rib fracture. No clavicle fracture.", False),
        ("Left basal scarring. No airspace disease. The lungs are otherwise clear.", False),
        ("Possible effusion. No effusion.", False),
    ],
)
def test_contradictions(text, contradicts):
    assert bool(contradictions(read_facts(text))) == contradicts


KINDS = {"rib fracture": "rib", "clavicle fracture": "clavicle", "pleural plaque": "plaque", "apical cap": "thickening"}
KINDS |= {"pleural thickening": "thickening", "nodule": "nodule", "mass": "mass"}
ALWAYS_PLACED = (  # the phantom never words these without their zone
    *("linear atelectasis", "basal atelectasis", "lobar collapse", "lobar consolidation", "rib fracture", "nodule"),
    *("mass", "hazy opacity", "patchy pneumonia", "apical cap"),
)


def phantom_reports(patients: int, seed: int):
    """(study, its report with Findings and Impression)."""
    rng = np.random.default_rng(seed)
    for patient in sample_patients(patients, seed):
        prior = None
        for study in patient.studies:
            yield study, report_text(write_findings(study, rng, prior), write_impression(study, rng))
            prior = study


def test_facts_are_the_phantoms_truth():
    found = placed = sided = right_side = right_zone = claimed = true = 0
    expected = 0
    for study, text in phantom_reports(150, seed=90):
        claims = [fact for fact in read_facts(text) if fact.state != "absent"]
        for finding in study.findings:
            kind = finding.kind if finding.label == "Support Devices" else KINDS.get(finding.kind, "")
            own = [fact for fact in claims if fact.finding == finding.label and (not kind or fact.kind == kind)]
            state = {1: "present", -1: "uncertain"}[finding.state]
            expected, found = expected + 1, found + any(fact.state == state for fact in own)
            side = {"bilateral": "both"}.get(finding.side, finding.side)
            if own and finding.label != "Edema":  # in both lungs, and rarely called so
                sided, right_side = sided + 1, right_side + any(fact.side == side for fact in own)
            if own and finding.kind in ALWAYS_PLACED:
                placed += 1
                right_zone += any(fact.side == side and same_zone(fact.zone, finding.zone) for fact in own)
        truth = {finding.label: [f for f in study.findings if f.label == finding.label] for finding in study.findings}
        for fact in claims:
            sides = {"": {"left", "right", "bilateral", ""}, "both": {"bilateral"}}.get(fact.side, {fact.side})
            named = any(finding.side in sides for finding in truth.get(fact.finding, []))
            implied = fact.finding == "Lung Opacity" and not truth.keys().isdisjoint(OPACITIES)
            claimed, true = claimed + 1, true + (named or implied)
    assert min(found / expected, right_side / sided, right_zone / placed, true / claimed) >= 0.97


def reports(seed=91) -> list[str]:
    return [text for _, text in phantom_reports(60, seed)]


def draw(references, hypotheses) -> dict[str, float]:
    scores = fact_draws(references, hypotheses, np.ones((1, len(references))))
    return {name: float(values[0]) for name, values in scores.items()}


def test_identical_reports_score_one():
    scores = draw(reports(), reports())
    assert [scores[name] for name in ("fact_f1", "fact_precision", "fact_recall", "side_right")] == [1, 1, 1, 1]
    assert scores["contradictions"] == scores["invented_priors"] == 0


def test_nothing_named_is_no_number_and_no_error():
    scores = draw(["The lungs are clear."], ["No effusion."])
    assert all(np.isnan(scores[name]) for name in ("fact_f1", "fact_precision", "fact_recall", "side_right"))
    silent = draw(["Left effusion."], [""])
    assert silent["fact_recall"] == silent["fact_f1"] == 0 and np.isnan(silent["fact_precision"])


def test_a_mirrored_report_has_no_side_right():
    def mirrored(text):
        return re.sub(r"(?i)left|right", lambda word: "right" if word[0].lower() == "left" else "left", text)

    texts = reports()
    scores = draw(texts, [mirrored(text) for text in texts])
    assert scores["side_right"] == 0 and scores["fact_f1"] < 0.9


def test_the_order_of_sentences_does_not_matter():
    rng = np.random.default_rng(0)
    for text in reports():
        sentences = re.split(r"(?<=\.) ", text.replace("Findings: ", "").replace("Impression: ", ""))
        shuffled = " ".join(sentences[i] for i in rng.permutation(len(sentences)))
        assert things(read_facts(shuffled)) == things(read_facts(" ".join(sentences)))


def test_other_words_for_the_same_are_worth_as_much():
    same = [
        ("Bilateral pleural effusions.", "Left effusion. Right effusion."),
        ("Small left pleural effusion. No edema.", "Findings: Left effusion. Impression: Small effusion."),
        ("Right apical nodule of 1.2 cm.", "A nodule in the right upper lobe measures 13 mm."),
        ("Moderate cardiomegaly.", "The heart is moderately enlarged. The lungs are clear."),
    ]
    for reference, hypothesis in same:
        assert draw([reference], [hypothesis])["fact_f1"] == 1


def test_each_attribute_that_is_wrong_halves_the_credit():
    fact = Fact("Lung Lesion", "present", "nodule", "left", "upper", "small", 12.0)
    changed = {"state": "uncertain", "side": "right", "zone": "lower", "grade": "large", "size_mm": 30.0}
    for i in range(len(changed) + 1):
        wrong = fact._replace(**dict(list(changed.items())[:i]))
        assert credit(fact, wrong) == 0.5**i
    assert credit(fact, fact._replace(kind="mass")) == 0
    assert credit(fact._replace(side="", grade=""), fact) == 1  # what the reference does not say cannot be wrong
    pairs = matched([fact, fact._replace(side="right")], [fact._replace(side="right"), fact._replace(zone="")])
    assert [pair.credit for pair in pairs] == [0.5, 1]


def test_an_invented_prior_needs_a_reference_without_one():
    counts = fact_counts("Left effusion.", "Unchanged left effusion.")
    assert counts.invented_prior and counts.without_prior
    assert not fact_counts("Stable left effusion.", "Unchanged left effusion.").invented_prior
    scores = draw(["Left effusion.", "Stable."], ["New left effusion.", "Stable."])
    assert scores["invented_priors"] == 1 and scores["fact_f1"] == 1


def test_bootstrap_weights_count_studies():
    references, hypotheses = reports(), reports(seed=92)
    n = min(len(references), len(hypotheses))
    references, hypotheses = references[:n], hypotheses[:n]
    weights = bootstrap_weights(range(n), samples=3, seed=1)
    draws = fact_draws(references, hypotheses, weights)
    for row in (1, 2, 3):
        picked = np.repeat(np.arange(n), weights[row].astype(int))
        again = draw([references[i] for i in picked], [hypotheses[i] for i in picked])
        assert {name: values[row] for name, values in draws.items()} == pytest.approx(again, nan_ok=True)


def test_facts_are_recorded_and_stand_in_the_model_card():
    from lightmedvlm_utils.config import PROFILES

    texts = reports()[:12]
    records = ReportScorer(texts, range(12), samples=10).records("sasa", texts[1:] + texts[:1])
    card = model_card(records, PROFILES["smoke"], "phantom", 1, "sasa")
    assert "| system | fact F1 | side right, where both name one |" in card


def test_reading_is_fast_and_its_time_stays_in_proportion():
    texts = [re.sub("left", f"left {i} mm", text) for i, text in enumerate(reports() * 5)]
    facts._sentence_facts.cache_clear()
    label_time, fact_time = time.process_time(), 0.0
    label_reports(texts)
    label_time = time.process_time() - label_time
    fact_time = -time.process_time()
    for text in texts:
        read_facts(text)
    fact_time += time.process_time()
    assert len(texts) / fact_time > 300 and fact_time < 6 * label_time + 0.1

    def seconds(n: int) -> float:
        facts._sentence_facts.cache_clear()
        changes.sentence_compares.cache_clear()
        start = time.process_time()
        for unit in ("left effusion and ", "opacity likely ", "small right 2 cm nodule, ", "since the prior "):
            read_facts(unit * n)
            compares_with_prior(unit * n)
        return time.process_time() - start

    short, long = (min(seconds(n) for _ in range(2)) for n in (300, 600))
    assert long < 3 * short + 0.05


def test_one_error_is_planted_and_everything_else_stays():
    for error in ERRORS:
        for case in crash_cases(error, 5, seed=93):
            before, after = (set(re.split(r"(?<=[.:]) ", text)) for text in (case.candidate, case.damaged))
            assert 1 <= len(before ^ after) <= 4  # another sentence in the findings, and one in the impression
            truths = [things(read_facts(text)) for text in (case.reference, case.candidate, case.other)]
            assert [len(truth) for truth in truths] == [len(truths[0])] * 3


def test_the_fact_score_notices_what_words_do_not():
    table = crash_table(40, seed=94, tested={name: METRICS[name] for name in ("fact score", "BLEU-4")})[NOTICED]
    assert (table.loc[list(ERRORS), "fact score"] >= 0.9).all()
    assert (table.loc[list(ERRORS), "BLEU-4"] < 0.5).all()
    assert (table.loc[HARMLESS] <= 0.05).all()
