#!/usr/bin/env python3
"""Searches by several methods, budgets and seeds on the embedded model, whose 6561 plans are all measured once on tokens
that no search sees: the share of the exhaustive front's hypervolume that each search finds, for docs/accuracy.md.

Each search is one call of the example 11-automixq and one JSON line of the log; searches that are in the log are not
repeated. `--table` prints the table of the log.

    cargo build --release -p kiln-examples --example 11-automixq
    scripts/automixq.py --program target/release/examples/11-automixq
"""

import argparse
import json
import pathlib
import statistics
import subprocess

from study import ROOT, once, read_log

BUDGETS = [40, 120, 328]
SEEDS = range(10)


def search(options, method, evaluations, seed):
    figures = options.out / "figures.json"
    # Pruning depends on the seed: without it all searches share one space and the figures of all plans.
    command = [options.program, "--ratio", "0", "--steps", "0", "--exhaustive", "--out", options.out]
    command += ["--method", method, "--evaluations", str(evaluations), "--seed", str(seed), "--json", figures]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    found = json.loads(figures.read_text())
    return {
        "fraction": found["hypervolume_fraction"],
        "measured": found["evaluations"],
        "points": len(found["front"]),
        "exhaustive_points": len(found["exhaustive_front"]),
    }


def table(options):
    runs = read_log(options.log)
    print(f"| method | {' | '.join(f'{budget} evaluations' for budget in BUDGETS)} |")
    print("| --- " * (len(BUDGETS) + 1) + "|")
    for method in dict.fromkeys(run["method"] for run in runs):
        cells = []
        for budget in BUDGETS:
            mine = [run for run in runs if (run["method"], run["evaluations"]) == (method, budget)]
            if not mine:
                cells.append("")
                continue
            fractions = [run["fraction"] for run in mine]
            cell = f"{statistics.mean(fractions):.4f}"
            if len(fractions) > 1:
                cell += f" ± {statistics.stdev(fractions):.4f}, least {min(fractions):.4f}"
            cells.append(f"{cell}; {len(mine)} seeds, {statistics.mean(run['measured'] for run in mine):.0f} measured")
        print(f"| {method} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="the built example 11-automixq")
    parser.add_argument("--methods", nargs="+", default=["klmix", "paper", "random", "nsga2", "bo", "amq", "released"])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target/kiln-automixq")
    parser.add_argument("--log", type=pathlib.Path, default=ROOT / "docs/results/automixq.jsonl")
    parser.add_argument("--table", action="store_true", help="only print the table of the log")
    options = parser.parse_args()
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        for method in options.methods:
            for budget in BUDGETS:
                for seed in SEEDS:
                    wanted = {"method": method, "evaluations": budget, "seed": seed}
                    once(options.log, wanted, lambda: search(options, **wanted))
    table(options)


if __name__ == "__main__":
    main()
