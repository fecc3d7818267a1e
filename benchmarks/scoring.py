"""What the scores of one system cost at the size of MIMIC-CXR's test set: 3,858 reports, 1,000 bootstrap draws.

    python benchmarks/scoring.py [--studies 3858] [--meteor] [--json]

References and "generated" reports are those of different phantom studies, cleaned as notebook 01 cleans them; no image
is rendered. Scored is everything that works offline: both protocols, every section, F1 by label, scores of each study.
Prints the seconds of each part, measured alone, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import numpy as np
import pandas as pd
import psutil

from lightmedvlm_utils.data.reports import clean_reports
from lightmedvlm_utils.evaluation import metrics
from lightmedvlm_utils.evaluation.bootstrap import bootstrap_weights
from lightmedvlm_utils.evaluation.scorers import PER_STUDY, ReportScorer
from lightmedvlm_utils.phantom.patients import sample_patients
from lightmedvlm_utils.phantom.reports import write_report

GOAL = 120  # seconds on 2 cores


def phantom_reports(studies: int, seed: int = 0) -> pd.DataFrame:
    """At least `studies` cleaned reports with findings: subject_id, images (their number), report."""
    rng = np.random.default_rng(seed)
    rows = [
        (study.subject_id, len(study.views), write_report(study, rng))
        for patient in sample_patients(studies, seed)
        for study in patient.studies
    ]
    table = pd.DataFrame(rows, columns=["subject_id", "images", "text"])
    table = pd.concat([table.drop(columns="text"), clean_reports(table["text"])], axis=1)
    return table[table["findings"] != ""].reset_index(drop=True)


def check_meteor(references: list[str], generated: list[str], studies: int = 200) -> None:
    """Our METEOR of a corpus, as it is and resampled, against pycocoevalcap's own call."""
    from pycocoevalcap.meteor.meteor import Meteor

    expected, proposed = (
        [" ".join(metrics.words(report)) for report in side[:studies]] for side in (references, generated)
    )
    weights = bootstrap_weights(range(studies), samples=1)
    ours = metrics.meteor_draws(expected, proposed, weights, str.split, corpus=True)["meteor"]
    for row, value in zip(weights.astype(int), ours, strict=True):
        rows = np.repeat(np.arange(studies), row)
        pair = ({k: [side[i]] for k, i in enumerate(rows)} for side in (expected, proposed))
        theirs = Meteor().compute_score(*pair)[0]
        assert abs(theirs - value) < 1e-12, (theirs, value)


@contextmanager
def peak_memory(interval: float = 0.02) -> Iterator[list[float]]:
    """Largest resident memory in MB inside the block, as the one element of the list it gives."""
    process, done, peak = psutil.Process(), Event(), [0.0]

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], process.memory_info().rss / 2**20)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(studies: int, meteor: bool) -> dict:
    """Seconds of every part and peak memory."""
    seconds: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    reports = phantom_reports(3 * studies)
    test, other, train = (reports.iloc[k * studies : (k + 1) * studies] for k in range(3))
    generated = other["report"].tolist()
    before = psutil.Process().memory_info().rss / 2**20
    with peak_memory() as peak:
        with part("references, weights, vocabulary"):
            scorer = ReportScorer(
                test["report"].tolist(), test["subject_id"].tolist(), samples=1000, meteor=meteor,
                images=test["images"].tolist(), train_reports=train["report"].tolist(), r2gen_style="mimic",
            )  # fmt: skip
        for comparison in scorer.comparisons:
            where = comparison.where
            with part(f"{where.protocol}, {where.section}, {where.n} of unit {where.unit}"):
                scorer._compute_draws(comparison, generated)
        with part("all records of a system"):
            records = scorer.records("generated", generated, per_label=True)
        for function in PER_STUDY:
            with part(f"each study: {function.__name__}"):
                function(scorer.references, generated)
        with part("all scores of each study"):
            scorer.per_study("generated", generated)
    if meteor:
        check_meteor(test["report"].tolist(), generated)
    whole = sum(seconds[name] for name in seconds if name.startswith(("references", "all ")))
    return {
        "studies": studies,
        "mean_words": round(float(np.mean([len(text.split()) for text in generated])), 1),
        "records": len(records),
        "seconds": seconds,
        "whole_seconds": round(whole, 1),
        "goal_seconds": GOAL,
        "memory_before_mb": round(before),
        "peak_memory_mb": round(peak[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=3858)
    parser.add_argument("--meteor", action="store_true", help="METEOR too, checked against pycocoevalcap's")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.studies, options.meteor)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.pop("seconds").items():
        print(f"{value:8.2f} s  {name}")
    print("\n".join(f"{name}: {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
