"""The phantom's images: deterministic, sized as asked, and every finding changes the film where its mask is."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from lightmedvlm_utils.observations import FINDINGS, LABELS
from lightmedvlm_utils.phantom.images import render
from lightmedvlm_utils.phantom.patients import Finding, sample_patients, true_states

SIZE = 96


@pytest.fixture(scope="module")
def patients():
    return sample_patients(400, seed=5)


@pytest.fixture(scope="module")
def studies(patients):
    return [study for patient in patients for study in patient.studies]


def _healthy(studies):
    return next(s for s in studies if not s.findings and s.views[0].position == "PA" and abs(s.habitus) < 0.5)


def _finding(label, **changes):
    """A plain example of a label, taken from the sampler's own vocabulary."""
    kinds = {"Fracture": "rib fracture", "Lung Lesion": "mass", "Support Devices": "pacemaker",
             "Pleural Other": "pleural plaque", "Atelectasis": "basal atelectasis",
             "Pneumonia": "patchy pneumonia", "Edema": "alveolar edema"}  # fmt: skip
    zones = {"Pneumothorax": "apical", "Pleural Effusion": "basal", "Atelectasis": "basal"}
    example = Finding(label, kinds.get(label, label.lower()), "left", zones.get(label, "mid"), 0.8, 1, 7, 40.0)
    return replace(example, **changes)


def test_patients_do_not_depend_on_how_many_are_drawn(patients):
    assert sample_patients(20, seed=5) == patients[:20]
    assert sample_patients(20, seed=6) != patients[:20]


def test_ids_are_unique_and_look_like_mimic(patients, studies):
    subjects = [patient.subject_id for patient in patients]
    images = [view.dicom_id for study in studies for view in study.views]
    assert len(set(subjects)) == len(subjects) and all(10_000_000 <= s < 20_000_000 for s in subjects)
    assert len({s.study_id for s in studies}) == len(studies)
    assert all(50_000_000 <= s.study_id < 60_000_000 for s in studies)
    assert len(set(images)) == len(images) and all(len(i) == 44 for i in images)


def test_every_finding_is_common_enough_to_learn(studies):
    definite = Counter(label for s in studies for label, t in true_states(s).items() if t.state == 1)
    assert all(definite[label] >= 0.06 * len(studies) for label in FINDINGS)
    assert 0.2 < definite["No Finding"] / len(studies) < 0.4
    borderline = np.mean([f.state == -1 for s in studies for f in s.findings if f.label != "Support Devices"])
    assert 0.04 < borderline < 0.15


def test_borderline_findings_are_the_faint_ones(studies):
    for finding in (f for s in studies for f in s.findings):
        assert (finding.severity < 0.3) == (finding.state == -1)


@pytest.mark.parametrize("label", ["Atelectasis", "Consolidation", "Edema", "Lung Lesion", "Pneumonia"])
def test_lung_opacity_follows_its_children(studies, label):
    study = replace(_healthy(studies), findings=(_finding(label),))
    assert true_states(study)["Lung Opacity"].state == 1
    hedged = replace(study, findings=(_finding(label, state=-1, severity=0.2),))
    assert true_states(hedged)["Lung Opacity"].state == 0
    assert true_states(hedged)["No Finding"].state == 0


def test_no_finding_means_nothing_but_devices(studies):
    study = replace(_healthy(studies), findings=(_finding("Support Devices"),))
    assert set(true_states(study)) == set(LABELS)
    assert true_states(study)["No Finding"].state == 1


def test_same_input_same_bytes_in_any_order(studies):
    jobs = [(study, view) for study in studies[:12] for view in study.views]
    first = [render(study, view, SIZE)[0].tobytes() for study, view in jobs]
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda job: render(*job, SIZE)[0].tobytes(), jobs[::-1]))
    assert first == again[::-1]


@pytest.mark.parametrize("size", [64, 113, 256])
def test_image_and_masks_have_the_size_asked_for(studies, size):
    study = next(s for s in studies if len(s.views) == 2 and len(s.findings) >= 3)
    for view in study.views:
        image, masks = render(study, view, size)
        assert image.shape == (size, size) and image.dtype == np.uint8
        assert image.std() > 20
        for label, mask in masks.items():
            assert label in FINDINGS and mask.shape == image.shape and mask.dtype == bool


def test_healthy_films_have_no_masks(studies):
    assert all(render(s, v, SIZE)[1] == {} for s in studies[:30] if not s.findings for v in s.views)


@pytest.mark.parametrize("label", FINDINGS)
def test_a_finding_changes_the_film_mostly_where_its_mask_is(studies, label):
    healthy = _healthy(studies)
    view = replace(healthy.views[0], noise=0.0)
    before, _ = render(healthy, view, SIZE)
    after, masks = render(replace(healthy, findings=(_finding(label),)), view, SIZE)
    change = np.abs(after.astype(float) - before)
    mask = masks[label]
    assert 3 < mask.sum() < 0.4 * mask.size
    assert change[mask].mean() > 2.5 * change[~mask].mean()
    if label != "Cardiomegaly" and label != "Enlarged Cardiomediastinum":  # most of these was white before
        assert change[mask].mean() > 8


@pytest.mark.parametrize("label", ["Pleural Effusion", "Lung Lesion", "Pneumothorax", "Consolidation"])
def test_left_is_on_the_right_of_the_film(studies, label):
    study = _healthy(studies)
    for side, left in (("left", True), ("right", False)):
        _, masks = render(replace(study, findings=(_finding(label, side=side),)), study.views[0], SIZE)
        assert (np.nonzero(masks[label])[1].mean() > SIZE / 2) == left


def test_a_larger_effusion_covers_more(studies):
    study = _healthy(studies)
    areas = []
    for severity in (0.3, 0.6, 0.95):
        findings = (_finding("Pleural Effusion", severity=severity),)
        areas.append(render(replace(study, findings=findings), study.views[0], SIZE)[1]["Pleural Effusion"].sum())
    assert areas == sorted(areas) and areas[2] > 2 * areas[0]


def test_lateral_films_show_effusion_but_not_pneumothorax(studies):
    study = next(s for s in studies if not s.findings and len(s.views) == 2)
    sick = replace(study, findings=(_finding("Pleural Effusion"), _finding("Pneumothorax")))
    assert set(render(sick, study.views[1], SIZE)[1]) == {"Pleural Effusion"}
