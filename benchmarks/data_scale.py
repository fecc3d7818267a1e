"""Notebooks 01 and 02 at the size of MIMIC-CXR: 227,835 reports cleaned and labelled, 223,414 label vectors clustered.

    python benchmarks/data_scale.py            # all of it, some minutes on 2 cores
    python benchmarks/data_scale.py --plain    # also HDBSCAN's plain call on 10,000 rows, for the ratio

The reports are the 3,955 real ones of Open-i, repeated and varied: sentences in another order, some left out, a
measurement put in, so that few sentences have been seen before. They go from a generator through the processes into a
parquet file; peak memory is taken at a quarter of the reports and at all of them. Prints one JSON object.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.clusters import cluster_labels, label_matrix, silhouette
from lightmedvlm_utils.data.labels import label_reports
from lightmedvlm_utils.data.openi import package_file
from lightmedvlm_utils.data.parallel import map_chunks
from lightmedvlm_utils.data.readers import read_studies
from lightmedvlm_utils.data.reports import clean_reports
from lightmedvlm_utils.observations import LABELS

REPORTS = 227_835


def varied_reports(n: int, seed: int = 0) -> Iterator[str]:
    """n report files in Open-i's words, one after another."""
    rng = np.random.default_rng(seed)
    raw = read_studies("openi")[0]
    bodies = [(row.indication, *(re.split(r"(?<=\.)\s+", part) for part in (row.findings, row.impression)))
              for row in raw.itertuples()]  # fmt: skip
    for number in range(n):
        indication, findings, impression = bodies[rng.integers(len(bodies))]
        findings = [findings[i] for i in rng.permutation(len(findings))[: max(2, len(findings) - rng.integers(3))]]
        size = f"A {rng.integers(2, 90) / 10} cm nodule is seen {rng.integers(1, 15)} cm above hemidiaphragm {number}."
        yield (
            f"                                 FINAL REPORT\n INDICATION:  {indication}\n \n FINDINGS:  \n \n "
            f"{' '.join([*findings, size])}\n \n IMPRESSION:  \n \n 1. {' '.join(impression)}\n 2. See above.\n"
        )


def clean_and_label(texts: list[str]) -> pd.DataFrame:
    table = clean_reports(texts)
    return pd.concat([table, label_reports(table["report"])], axis=1)


def text_run(n: int, jobs: int) -> dict:
    """Clean and label n reports into a parquet file; in a process of its own, whose peak memory is its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, writer, start = 0, None, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for table in map_chunks(clean_and_label, varied_reports(n), jobs=jobs):
            part = pa.Table.from_pandas(table, preserve_index=False)
            writer = writer or pq.ParquetWriter(Path(folder) / "studies.parquet", part.schema)
            writer.write_table(part)
            rows += len(table)
        if writer is not None:
            writer.close()
    seconds = time.perf_counter() - start
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(used.ru_utime + used.ru_stime for used in usage)  # what a shared machine cannot stretch
    return dict(
        reports=rows, jobs=jobs, seconds=round(seconds, 1), cpu_seconds=round(cpu, 1), peak_mb=round(peak / 1024)
    )  # fmt: skip


def cluster_run(plain: bool) -> dict:
    labels = pd.read_csv(package_file("chexpert_train.csv.gz"), usecols=list(LABELS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    ids = cluster_labels(labels)
    clustered, cpu = time.perf_counter(), time.process_time() - cpu
    scores = {f"silhouette_{name}_noise": round(silhouette(labels, ids, with_noise=flag), 4)
              for name, flag in (("with", True), ("without", False))}  # fmt: skip
    result = dict(
        rows=len(labels), clusters=int(ids.max() + 1), noise=round(float((ids < 0).mean()), 3), **scores,
        cluster_seconds=round(clustered - start, 2), cluster_cpu_seconds=round(cpu, 2),
        silhouettes_seconds=round(time.perf_counter() - clustered, 2),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), before_mb=round(before / 1024),
    )  # fmt: skip
    if plain:
        import hdbscan

        sample = labels.sample(10_000, random_state=0)
        matrix = label_matrix(sample).astype(float)
        start = time.perf_counter()
        hdbscan.HDBSCAN(min_cluster_size=100, min_samples=10).fit(matrix)
        middle = time.perf_counter()
        cluster_labels(sample)
        result["plain_over_ours_at_10000"] = round((middle - start) / (time.perf_counter() - middle), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=int, default=REPORTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="also time HDBSCAN's plain call on 10,000 rows")
    parser.add_argument("--part", choices=["text", "clusters"], help="one part only, in this process")
    options = parser.parse_args()
    if options.part:
        found = text_run(options.reports, options.jobs) if options.part == "text" else cluster_run(options.plain)
        print(json.dumps(found))
        return

    def child(*arguments: str) -> dict:
        command = [sys.executable, __file__, "--jobs", str(options.jobs), *arguments]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    quarter = child("--part", "text", "--reports", str(options.reports // 4))
    whole = child("--part", "text", "--reports", str(options.reports))
    one = child("--part", "text", "--reports", str(options.reports // 4), "--jobs", "1")
    result = {
        "text": whole | {
            "reports_per_second_and_core": round(one["reports"] / one["cpu_seconds"]),
            "speed_up": round(one["seconds"] / quarter["seconds"], 2),
            "share_of_the_5_minutes": round(whole["seconds"] / 300, 2),
            "peak_memory_over_that_of_a_quarter": round(whole["peak_mb"] / quarter["peak_mb"], 2),
        },
        "clusters": child("--part", "clusters", *(["--plain"] if options.plain else [])),
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
