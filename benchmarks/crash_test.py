"""Which errors in a report does a metric notice? Eight kinds are planted into phantom reports; see evaluation/crash.py.

Prints two Markdown tables, a row per kind of error and a column per metric: the share of errors noticed beyond what
harmless words cost, and the share by any fall at all. Run: python benchmarks/crash_test.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pandas as pd

from lightmedvlm_utils.evaluation.crash import LOWER, NOTICED, crash_table

TITLES = {
    NOTICED: "Share noticed: lower than the undamaged report by more than 95 % of harmless rewordings",
    LOWER: "Share with any fall below the undamaged report",
}


def markdown(table: pd.DataFrame) -> str:
    """A table of shares with two decimals."""
    lines = ["| error planted | " + " | ".join(table.columns) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [f"| {error} | " + " | ".join(f"{share:.2f}" for share in row) + " |" for error, row in table.iterrows()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=1000, help="reports per kind of error")
    parser.add_argument("--seed", type=int, default=777, help="of the phantom patients; seeds below 100 were tuned on")
    parser.add_argument("--csv", help="also write the first table to this file")
    options = parser.parse_args(arguments)
    table = crash_table(options.reports, options.seed)
    if options.csv:
        table[NOTICED].round(3).to_csv(options.csv)
    for definition, title in TITLES.items():
        print(f"\n{title} ({options.reports} reports per kind, seed {options.seed})\n")
        print(markdown(table[definition]))


if __name__ == "__main__":
    main()
