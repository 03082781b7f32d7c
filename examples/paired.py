"""Read what `ablation.py` wrote: accuracy of each variant, and its difference to the first one over the seeds that both have.

    python examples/paired.py docs/studies/digits-test.jsonl

One table for each data set and IPC; the reference is the variant whose line comes first, or the first that has the text given as
`--reference` in it. Accuracy in percent: mean over seeds, standard deviation over all students, seeds. A difference is a
mean over paired seeds, with its standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Runs = dict[int, dict[str, Any]]


def difference(runs: Runs, reference: Runs) -> str:
    """Over the seeds that both have."""
    pairs = [runs[seed]["accuracy"] - reference[seed]["accuracy"] for seed in sorted(runs.keys() & reference.keys())]
    if len(pairs) < 2:
        return f"{pairs[0]:+.2f} (one seed)" if pairs else ""
    return f"{statistics.fmean(pairs):+.2f} +- {statistics.stdev(pairs) / len(pairs) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="")
    parser.add_argument("files", nargs="+", type=Path)
    asked = parser.parse_args()
    tables: dict[tuple[Any, ...], dict[str, Runs]] = defaultdict(dict)
    for line in (line for file in asked.files for line in file.read_text().splitlines()):
        run = json.loads(line)
        table = tables[run["dataset"], run["ipc"], run["held_out"]]
        table.setdefault(json.dumps(run["variant"]), {})[run["seed"]] = run
    for (dataset, ipc, is_held_out), table in tables.items():
        reference = next((name for name in table if asked.reference and asked.reference in name), next(iter(table)))
        print(f"{dataset}, IPC {ipc}, {'held-out training' if is_held_out else 'test'} images; against {reference}")
        for name, runs in sorted(
            table.items(), key=lambda entry: -statistics.fmean(r["accuracy"] for r in entry[1].values())
        ):
            mean = statistics.fmean(run["accuracy"] for run in runs.values())
            students = [each for run in runs.values() for each in run["students"]]
            spread = statistics.stdev(students) if len(students) > 1 else 0.0
            against = "" if name == reference else difference(runs, table[reference])
            print(f"  {mean:6.2f}  std {spread:4.2f}  seeds {len(runs)}  {against:16}  {name}")


if __name__ == "__main__":
    main()
