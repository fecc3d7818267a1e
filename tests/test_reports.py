"""Sections and cleaning of report text: what radiologists wrote must come out as they meant it."""

import re
import time

import numpy as np
import pytest

from lightmedvlm_utils.data.reports import (
    SECTIONS,
    clean_report,
    clean_reports,
    parse_sections,
    report_text,
    split_report,
)
from lightmedvlm_utils.phantom.patients import sample_patients
from lightmedvlm_utils.phantom.reports import LAYOUTS, write_report

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___ year old woman with cough.
 
 COMPARISON:  None.
 
 FINDINGS: 
 
 Moderate cardiomegaly.  No pleural
 effusion.
 
 IMPRESSION: 
 
 1. Moderate cardiomegaly.
 2. No pneumonia.
"""


def test_mimic_sections():
    sections = parse_sections(MIMIC)
    assert tuple(sections) == SECTIONS
    assert sections["examination"] == "CHEST (PA AND LAT)"
    assert sections["indication"] == "___ year old woman with cough."
    assert sections["comparison"] == "None."
    assert sections["findings"].split() == ["Moderate", "cardiomegaly.", "No", "pleural", "effusion."]
    assert sections["impression"].startswith("1. Moderate")


def test_inline_title_case_and_windows_line_ends():
    assert parse_sections("Findings: Clear. Impression: Normal.")["impression"] == "Normal."
    assert parse_sections(MIMIC.replace("\n", "\r\n")) == parse_sections(MIMIC)


@pytest.mark.parametrize("heading", ["RECOMMENDATION", "RECOMMENDATION(S)", "NOTIFICATION", "NOTIFICATION(S)"])
def test_what_follows_the_impression_is_none(heading):
    for between in ("\n\n ", " "):
        text = f"FINDINGS: Small nodule.\n\nIMPRESSION: Nodule.{between}{heading}:  CT in three months."
        sections = parse_sections(text)
        assert (sections["findings"], sections["impression"]) == ("Small nodule.", "Nodule.")
        assert "CT in three months." in (sections["recommendation"], sections["notification"])


@pytest.mark.parametrize("heading", ["PATIENT HISTORY", "CLINICAL HISTORY", "CLINICAL HISTORY/INDICATION"])
def test_a_history_without_findings_is_no_findings(heading):
    sections = parse_sections(f"{heading}:\n\n Cough for two weeks.\n\nIMPRESSION: Normal.")
    assert (sections["indication"], sections["findings"]) == ("Cough for two weeks.", "")
    assert parse_sections(f"{heading}: Cough.\n\nThe lungs are clear.")["findings"] == "The lungs are clear."


@pytest.mark.parametrize(
    ("findings", "impression"),
    [("FIDINGS", "IMPRESION"), ("FINDNGS", "IMPRSSION"), ("Findigns", "Imperssion"), ("FINDINSG", "MPRESSION")],
)
def test_misspelt_headings(findings, impression):
    sections = parse_sections(f" {findings}: Clear lungs.\n {impression} : Normal.\n")
    assert (sections["findings"], sections["impression"]) == ("Clear lungs.", "Normal.")


def test_words_that_only_resemble_a_heading_stay_in_the_text():
    text = "Two fractures.\nCompression: T11.\nDepression: none. Fidings: two."
    assert parse_sections(f"FINDINGS: {text}")["findings"] == text


def test_last_section_with_text_wins():
    text = "FINDINGS: Draft.\nFINDINGS: Small effusion.\nIMPRESSION: Effusion.\nIMPRESSION:\n"
    assert parse_sections(text)["findings"] == "Small effusion."
    assert parse_sections(text)["impression"] == "Effusion."


def test_wet_read_and_addendum_are_not_findings():
    text = f" WET READ: ___ 8:12 PM\n  Large effusion.\n {'_' * 70}\n{MIMIC}\n ADDENDUM: \n \n Called to Dr. ___.\n"
    sections = parse_sections(text)
    assert sections["findings"] == parse_sections(MIMIC)["findings"]
    assert sections["impression"] == parse_sections(MIMIC)["impression"]
    assert "Large effusion." in sections["wet_read"]
    assert sections["addendum"] == "Called to Dr. ___."


@pytest.mark.parametrize(
    "text",
    [
        "          FINAL REPORT\n The lungs are clear.\n",
        "INDICATION: Cough.\n \n COMPARISON: None.\n \n The lungs are clear.\n",
        "FINDINGS AND IMPRESSION: The lungs are clear.",
        "CHEST RADIOGRAPH PERFORMED ON ___\n\nThe lungs are clear.",
        "PORTABLE CHEST RADIOGRAPH: The lungs are clear.",
        "CHEST, TWO VIEWS, AP AND LATERAL:\n\n The lungs are clear.",
        "FINDINGS\nThe lungs are clear.\n\nIMPRESSION\nNormal.",
        "FINDINGS - The lungs are clear.\nIMPRESSION - Normal.",
    ],
)
def test_findings_without_their_own_heading(text):
    assert parse_sections(text)["findings"] == "The lungs are clear."


def test_a_report_in_capitals_is_no_title():
    assert parse_sections("PORTABLE CHEST\n\nTHE LUNGS ARE CLEAR.")["findings"] == "THE LUNGS ARE CLEAR."


def test_empty_report_has_no_sections():
    for text in ("", "  \n \n", "FINAL REPORT\n"):
        assert not any(parse_sections(text).values())


@pytest.mark.parametrize(
    "text",
    [
        "A 1.2-cm nodule is seen.",
        "The mass measures 3.5 cm x 2.1 cm.",
        "Compression of T11. No PTX.",
        "Stable since 9/2011. Scoliosis at L1-L2.",
        "Tip 4.5 cm above the carina at 9:40 a.m.",
        "Fracture of the 7th rib. 2 nodules. 3 mm granuloma.",
        "O2 saturation is low. No. 3 wire is broken.",
    ],
)
def test_numbers_units_and_levels_survive(text):
    assert clean_report(text) == text


def test_item_numbers_go_but_a_wrapped_number_stays():
    assert clean_report("1. Mild edema.\n 2. Fracture of rib\n 7. Stable.") == "Mild edema. Fracture of rib 7. Stable."
    assert clean_report("1. Edema. 2. Effusion.") == "Edema. Effusion."
    assert clean_report("1) edema\n2) effusion") == "edema. effusion."
    assert clean_report("1.Mild edema.\n2.Effusion.") == "Mild edema. Effusion."
    assert clean_report("1. Edema\n\n2. Effusion\n\n3. None") == "Edema. Effusion. None."
    assert clean_report("Fracture of rib\n 1. No pneumothorax") == "Fracture of rib 1. No pneumothorax."


def test_deidentification_policy():
    text = "Compared with the study of ___, no change. Discussed with Dr. ___ by phone on ___."
    assert clean_report(text) == "Compared with the study, no change. Discussed by phone."
    assert clean_report(text, deid="keep").count("___") == 3
    assert clean_report("Degeneration of the XXXX.") == "Degeneration."
    assert clean_report("The XXXX lungs are clear.") == "The lungs are clear."
    assert clean_report("___-year-old man. Chest x-XXXX is normal.") == "man. Chest is normal."
    assert clean_report("Broken 3rd-5XXXX ribs. Clips and XXXX XXXX.") == "Broken ribs. Clips."
    with pytest.raises(ValueError, match="deid"):
        clean_report(text, deid="drop")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The effusion is unchanged compared to ___.", "The effusion is unchanged."),
        ("In comparison with ___, there is edema.", "There is edema."),
        ("Compared\nto ___ the lungs are clear.", "The lungs are clear."),
        ("Unchanged as of ___. Results given per Dr. ___ at 9:40 a.m.", "Unchanged. Results given at 9:40 a.m."),
        ("Compared with the ___ chest radiograph, no change.", "Compared with the chest radiograph, no change."),
        ("Discussed between Dr. ___ and Dr. ___. Stable relative to ___.", "Discussed. Stable."),
        ("The tip is ___-20 mm lower.", "The tip is 20 mm lower."),
        ("Seen on ___ 3.5 cm below, XXXX-7 mm.", "Seen 3.5 cm below, 7 mm."),
    ],
)
def test_a_removed_token_leaves_a_sentence_and_every_number(text, left):
    assert clean_report(text) == left


PIECES = (
    "\n", " \n", " ", "CHEST ", "CHEST, ", "A", ". ", "1. ", "\n1", "of the ", "compared to ", "___ ", "_", "x-", "X",
    "XXXX-", "of XXXX", "XXXX,", "the prior ", "compared to the prior ", "prior from ", ", is unchanged",
    ", ", "no new ", "* ",
)  # fmt: skip


def seconds(piece: str, length: int) -> float:
    text = f"IMPRESSION: a {piece * (length // len(piece))}b"
    start = time.process_time()
    parse_sections(text)
    clean_report(text, priors="remove")
    return time.process_time() - start


def test_time_grows_with_the_text_and_not_faster():
    for piece in PIECES:
        # Twice the text takes twice the time, four times where the growth is quadratic; the shorter of two tries each.
        once, twice = (min(seconds(piece, length) for _ in range(2)) for length in (20_000, 40_000))
        assert twice < 3.2 * once + 0.05, piece


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Compared to the prior study of ___, the small effusion is unchanged.", "The small effusion."),
        ("In comparison with the study of ___, there is little change.", ""),
        ("There has been no change since the prior exam. T11 compression.", "T11 compression."),
        ("Again seen is a 1.2-cm nodule, unchanged from prior.", "A 1.2-cm nodule."),
        ("Stable cardiomegaly. New effusion.", "Cardiomegaly. Effusion."),
        ("The heart is not enlarged and unchanged.", "The heart is not enlarged."),
        ("No new consolidation.", "No new consolidation."),
        ("Asymmetric compared to the left.", "Asymmetric compared to the left."),
    ],
)
def test_comparisons_with_priors_can_go(text, left):
    assert clean_report(text, priors="remove") == left
    with pytest.raises(ValueError, match="priors"):
        clean_report(text, priors="drop")


def test_cleaning_twice_changes_nothing_and_leaves_one_line():
    rng = np.random.default_rng(0)
    for patient in sample_patients(40, seed=1):
        for study in patient.studies:
            once = clean_report(write_report(study, rng))
            assert clean_report(once) == once
            assert "\n" not in once and "___" not in once and "  " not in once


def test_report_text_omits_what_is_missing():
    assert report_text("Clear.", "Normal.") == "Findings: Clear. Impression: Normal."
    assert report_text("", "Normal.") == "Impression: Normal."
    assert report_text("", "") == ""


def test_split_report_undoes_report_text():
    for findings, impression in (("Clear.", "Normal."), ("", "Normal."), ("Other findings: none.", ""), ("", "")):
        expected = {"findings": findings, "impression": impression}
        assert split_report(report_text(findings, impression)) == expected
        assert split_report(report_text(findings, impression).lower()) == {k: v.lower() for k, v in expected.items()}
    assert split_report("The lungs are clear.") == {"findings": "The lungs are clear.", "impression": ""}


def test_many_at_once_equal_one_by_one():
    table = clean_reports([MIMIC, "", None] * 1_500, jobs=2)
    sections = parse_sections(MIMIC)
    findings, impression = clean_report(sections["findings"]), clean_report(sections["impression"])
    assert table.shape == (4_500, 4)
    assert table.iloc[0].tolist() == ["woman with cough.", findings, impression, report_text(findings, impression)]
    assert (table.iloc[1::3] == "").all(axis=None) and table.iloc[::3].drop_duplicates().shape[0] == 1


def test_phantom_reports_are_determined_usable_and_speak_a_small_language():
    words, usable, total = set(), 0, 0
    for patient in sample_patients(250, seed=0):
        for study in patient.studies:
            text = write_report(study, np.random.default_rng(study.study_id))
            assert text == write_report(study, np.random.default_rng(study.study_id))
            findings = clean_report(parse_sections(text)["findings"])
            words.update(re.findall(r"[a-z]+", findings.lower()))
            usable += findings != ""
            total += 1
    assert usable / total >= 0.88
    assert 100 < len(words) < 700
    assert abs(sum(LAYOUTS.values()) - 1) < 1e-9


def test_measurements_in_phantom_reports_match_the_findings():
    rng = np.random.default_rng(3)
    for patient in sample_patients(150, seed=2):
        for study in patient.studies:
            sizes = {f"{f.size_mm / 10:.1f}" for f in study.findings if f.label == "Lung Lesion"}
            text = clean_report(write_report(study, rng))
            assert set(re.findall(r"(\d+\.\d)[ -]cm", text)) <= sizes
