"""Does it look because it sees? The two experiments, on readers whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from lightmedvlm_utils.evaluation import causes
from lightmedvlm_utils.observations import LABELS
from lightmedvlm_utils.phantom.dataset import phantom_studies, write_phantom
from lightmedvlm_utils.phantom.patients import sample_patients, without_finding

SIZE = 64


class Seer:
    """Knows the films it is shown by heart and reads their truth."""

    def __init__(self, studies):
        self.known = {}
        for study in studies:
            for label in {finding.label for finding in study.findings} | {""}:
                shown = without_finding(study, label)
                self.known[causes.frontal_film(shown, SIZE).tobytes()] = {f.label for f in shown.findings}

    def report(self, images):
        return [" ".join(f"There is {label.lower()}." for label in sorted(self.known[i.tobytes()])) for i in images]

    def findings(self, images):
        return np.array([[0.9 if label in self.known[i.tobytes()] else 0.1 for label in LABELS] for i in images])


class Habit(Seer):
    """Says of every film the same."""

    def report(self, images):
        return ["There is pneumonia and edema."] * len(images)


@pytest.fixture(scope="module")
def studies():
    patients = sample_patients(60, 5)
    return [s for p in patients for s in p.studies if any(f.label in ("Pneumonia", "Edema") for f in s.findings)][:8]


def test_who_sees_a_finding_stops_saying_it_when_it_is_gone(studies):
    table = causes.counterfactual_table(Seer(studies), studies, SIZE)
    assert len(table) >= len(studies) and table["leaves"].eq(1).all()
    assert table["others_stay"].dropna().eq(1).all() and table["others_stay"].notna().any()
    assert (table["before"] > table["after"]).all()


def test_who_speaks_by_habit_goes_on_saying_it(studies):
    table = causes.counterfactual_table(Habit(studies), studies, SIZE)
    assert len(table) and table["leaves"].eq(0).all() and table["others_stay"].dropna().eq(1).all()


class Spot:
    """Sees an effusion where the film is white in one corner; points there, or elsewhere."""

    def __init__(self, points_at):
        self.points_at = points_at

    def findings(self, images):
        found = np.full((len(images), len(LABELS)), 0.01)
        found[:, LABELS.index("Pleural Effusion")] = [0.05 + 0.9 * film[48:56, 8:16].mean() for film in images]
        return found

    def attention(self, image):
        map_ = np.zeros((8, 8))
        map_[self.points_at] = 1
        return {"Pleural Effusion": map_}


def test_hiding_the_peak_costs_most_where_the_map_is_the_reason():
    film = np.full((SIZE, SIZE), 0.2, np.float32)
    film[48:56, 8:16] = 1
    honest, painted = (causes.occlusion_table(Spot(at), [film], [7]) for at in ((6, 1), (1, 6)))
    assert honest["wins"].tolist() == [1] and honest["own"].item() > 1
    assert painted["wins"].tolist() == [0]
    nothing = causes.occlusion_table(Spot((6, 1)), [np.zeros_like(film)], [7])
    assert nothing.empty and {"own", "wins"} <= set(nothing)


def test_what_is_hidden_is_a_square_and_leaves_no_edge():
    film = np.random.default_rng(0).random((SIZE, SIZE), np.float32)
    covered = causes.hide(film, (0, 30))
    changed = np.argwhere(covered != film)
    assert len(changed) and (np.ptp(changed, axis=0) < SIZE * causes.PATCH).all()
    even = np.full((SIZE, SIZE), 0.3, np.float32)
    np.testing.assert_array_equal(causes.hide(even, (20, 20)), even)


def test_records_average_over_the_findings():
    table = pd.DataFrame({"subject_id": [1, 1, 2], "leaves": [1.0, 0.0, 1.0], "others_stay": [np.nan, 1.0, 0.5]})
    rows = causes.cause_records({"counterfactual": table}, "sasa", 20, 0)
    assert {row["metric"]: (row["value"], row["n"]) for row in rows} == {
        "counterfactual_leaves": (pytest.approx(2 / 3), 3),
        "counterfactual_others_stay": (pytest.approx(0.75), 2),
    }


def test_a_phantom_knows_its_studies(tmp_path):
    write_phantom(tmp_path / "phantom", patients=20, size=SIZE, seed=3, workers=1, progress=False)
    found = phantom_studies(tmp_path / "phantom")
    listed = pd.read_csv(tmp_path / "phantom/mimic-cxr-2.0.0-split.csv.gz")["study_id"]
    assert set(found) == set(listed)
