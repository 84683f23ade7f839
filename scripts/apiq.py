#!/usr/bin/env python3
"""Perplexity before and after the same fine-tuning of models quantized to 4, 3 and 2 bits by several methods, for
docs/accuracy.md.

Each method is one call of the example 07-apiq and one JSON line of the log; those that are in the log are not repeated.
`--table` prints the tables of the log, `--plot FILE.svg` draws the activations' error by block at 2 bits.

    cargo build --release -p kiln-examples --example 07-apiq
    scripts/apiq.py --program target/release/examples/07-apiq [--smollm2 FILE.gguf]
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import tempfile

from study import ROOT, TEXT, once, read_log

METHODS = ["rtn", "nf", "awq", "gptq", "loftq", "apiq-lw", "apiq-bw"]
GROUP, RANK = 64, 16
# Windows of calibration, tokens of each; steps of the fine-tuning, rows of a batch, learning rate.
BUDGETS = {
    "tiny-llama": {"windows": 16, "length": 128, "steps": 40, "batch": 4, "lr": 1e-3},
    "smollm2": {"windows": 16, "length": 512, "steps": 30, "batch": 1, "lr": 4e-3},
}
# ApiQ's own; its factors are trained when the fine-tuning starts, which on SmolLM2 wants a smaller rate than B = 0.
APIQ = {
    "tiny-llama": {"epochs": 6, "lr-lora": 2e-3, "loss": "mean-squared"},
    "smollm2": {"epochs": 4, "loss": "relative", "lr": 1e-3},
}
# And by width: the fewer levels, the more of a range is worth clipping.
BY_BITS = {
    "tiny-llama": {4: {"initial-logit": 4}, 3: {"initial-logit": 2}},
    "smollm2": {
        4: {"initial-logit": 4, "lr-lora": 2e-3},
        3: {"initial-logit": 2, "lr-lora": 2e-3},
        2: {"lr-lora": 5e-3},
    },
}
# Other budgets at 2 bits, and of dense weights.
OTHERS = {
    "tiny-llama": [("apiq-bw", {"epochs": 2}), ("apiq-bw", {"epochs": 30})],
    "smollm2": [
        ("apiq-bw", {"windows": 32, "epochs": 10}),
        ("apiq-bw", {"windows": 32, "epochs": 10, "steps": 240}),
        ("apiq-bw", {"windows": 64, "epochs": 10, "lr-lora": 1e-2, "final-ratio": 0.05}),
        ("apiq-bw", {"windows": 64, "epochs": 10, "lr-lora": 1e-2, "final-ratio": 0.05, "steps": 240}),
        ("dense", {"lr": 2e-3, "steps": 240}),
    ],
}
SEEDS = {"tiny-llama": [0, 1, 2], "smollm2": [0]}


def calibrate(options, model, bits, method, seed, budget):
    with tempfile.TemporaryDirectory() as folder:
        figures = pathlib.Path(folder) / "figures.json"
        command = [options.program, "--methods", method, "--bits", bits, "--group", GROUP, "--rank", RANK]
        command += ["--seed", seed, "--out", folder, "--json", figures, "--no-original"]
        for name, value in budget.items():
            command += [f"--{name}", value]
        if model == "smollm2":
            command += ["--model", options.smollm2, "--calibration", TEXT / "shift_train_moby.txt"]
            command += ["--eval", ROOT / "testdata/text/moby_ch100_smollm2_10240.u16le"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        (row,) = json.loads(figures.read_text())["rows"]
    del row["method"], row["bits"]
    return row


def study(options, model, seeds):
    def figures(bits, method, seed, budget):
        wanted = {"model": model, "bits": bits, "method": method, "seed": seed, "budget": budget}
        once(options.log, wanted, lambda: calibrate(options, **wanted))

    if "dense" in options.methods:
        for seed in seeds:
            figures(32, "dense", seed, budget_of(model, "dense", 32))
    for bits in (2, 4, 3):
        for method in METHODS:
            for seed in seeds if method in options.methods else []:
                figures(bits, method, seed, budget_of(model, method, bits))
    for method, other in OTHERS[model]:
        if method in options.methods:
            bits = 32 if method == "dense" else 2
            figures(bits, method, seeds[0], budget_of(model, method, bits) | other)


def budget_of(model, method, bits):
    apiq = APIQ[model] | BY_BITS[model].get(bits, {}) if method.startswith("apiq") else {}
    return BUDGETS[model] | apiq


def table(options):
    runs = read_log(options.log)
    for model, budget in BUDGETS.items():
        print(f"\n{model}: {budget}; ApiQ {APIQ[model]}, by bits {BY_BITS[model]}\n\n| method | 4 bits: before | after | 3 bits: before | after | 2 bits: before | after |")
        print("| --- " * 7 + "|")
        for method in ["dense", *METHODS]:
            cells = []
            for bits in (32,) if method == "dense" else (4, 3, 2):
                mine = [run for run in runs if run["budget"] == budget_of(model, method, bits)
                        and (run["model"], run["bits"], run["method"]) == (model, bits, method)]
                cells += [mean([run[name] for run in mine]) for name in ("perplexity_before", "perplexity_after")]
            if any(cells):
                print(f"| {method} | {' | '.join(cells)} |")
        print("\nDense, and ApiQ-bw at 2 bits, by budget:")
        for run in runs:
            if (run["model"], run["bits"], run["method"]) in [(model, 32, "dense"), (model, 2, "apiq-bw")]:
                # A resumed run has no peaks of the blocks that it read.
                seconds, peaks = run["block_seconds"], [f"{peak / 1e6:.0f}" for peak in run["block_peak_rss_bytes"]]
                print(f"{run['method']} {run['budget']}, seed {run['seed']}: {run['perplexity_before']:.1f} -> {run['perplexity_after']:.1f}, "
                      f"{min(seconds):.1f} to {max(seconds):.1f} s a block, {run['seconds']:.0f} s; "
                      f"peak in MB after the first and last block {peaks[:1] + peaks[-1:]}")
        print("\nError after the first and the last block at 2 bits:")
        for method in METHODS:
            for run in runs:
                if (run["model"], run["bits"], run["method"], run["budget"]) == (model, 2, method, budget_of(model, method, 2)):
                    errors = run["activation_error"]
                    print(f"{method}, seed {run['seed']}: {errors[0]:.3f} {errors[-1]:.3f}")


def plot(options, model):
    """An SVG of the error of the residual stream behind each block at 2 bits, first seed, on a logarithmic axis."""
    runs = [run for run in read_log(options.log) if (run["model"], run["bits"], run["seed"]) == (model, 2, 0)
            and run["budget"] == budget_of(model, run["method"], 2)]
    errors = [error for run in runs for error in run["activation_error"]]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    blocks = len(runs[0]["activation_error"])

    def x(block):
        return 60 + 560 * block / (blocks - 1)

    def y(error):
        return 30 + 360 * (high - math.log10(error)) / (high - low)

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="760" height="440" font-family="sans-serif" font-size="12">',
             '<rect width="760" height="440" fill="white"/>',
             f'<text x="60" y="18">{model}, 2 bits: norm of the error over norm of the residual stream, after each block</text>']
    for power in range(low, high + 1):
        parts += [f'<line x1="60" x2="620" y1="{y(10 ** power):.1f}" y2="{y(10 ** power):.1f}" stroke="#ccc"/>',
                  f'<text x="54" y="{y(10 ** power) + 4:.1f}" text-anchor="end">{10.0 ** power:g}</text>']
    parts += [f'<text x="{x(block):.1f}" y="410" text-anchor="middle">{block + 1}</text>'
              for block in range(0, blocks, max(1, blocks // 10))]
    for index, run in enumerate(runs):
        color = f"hsl({index * 360 // len(runs)} 70% 40%)"
        points = " ".join(f"{x(block):.1f},{y(error):.1f}" for block, error in enumerate(run["activation_error"]))
        parts += [f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>',
                  f'<text x="634" y="{60 + 20 * index}" fill="{color}">{run["method"]}</text>']
    options.plot.write_text("\n".join([*parts, "</svg>\n"]))


def mean(values):
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="the built example 07-apiq")
    parser.add_argument("--smollm2", help="the GGUF file that scripts/fetch-smollm2 fetches")
    parser.add_argument("--models", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS], choices=["dense", *METHODS])
    parser.add_argument("--log", type=pathlib.Path, default=ROOT / "docs/results/apiq.jsonl")
    parser.add_argument("--table", action="store_true", help="only print the tables of the log")
    parser.add_argument("--plot", type=pathlib.Path, help="gets the activations' error of SmolLM2 by block")
    options = parser.parse_args()
    if not options.table:
        for model in options.models:
            if model != "smollm2" or options.smollm2:
                study(options, model, SEEDS[model])
    table(options)
    if options.plot:
        plot(options, "smollm2")


if __name__ == "__main__":
    main()
