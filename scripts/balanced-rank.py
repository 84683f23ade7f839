#!/usr/bin/env python3
"""Compares LoRA, Q-BaRA, QA-LoRA and QA-HiRA at about equal trainable parameters, for docs/accuracy.md.

Each run is one call of the example 03-finetune and one JSON line of the log; runs that are in the log are not repeated,
so the script goes on where it was stopped. `--table` prints the table of the log.

    cargo build --release -p kiln-examples --example 03-finetune
    scripts/balanced-rank.py --program target/release/examples/03-finetune [--smollm2 FILE.gguf]
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import tempfile

from study import ROOT, TEXT, once, read_log

GROUP = 32
STEPS, BATCH, LENGTH = 60, 2, 256

# Options of a method beside the rank. Pooling by sums and alpha = rank * GROUP for the mean of QA-HiRA make a step move
# the weights about as far as LoRA's; learning rates are the best of LEARNING_RATES on the embedded model at 4 bits with a
# seed of their own. SmolLM2 takes the same ones times the best of FACTORS, by short runs of two methods.
METHODS = {
    "lora": ["--method", "lora"],
    "qbara": ["--method", "qbara", "--lambda", "2"],
    "qalora": ["--method", "qalora", "--pool", str(GROUP), "--pooling", "sum"],
    "qahira": ["--method", "qahira", "--pool", str(GROUP), "--repeat", "1"],
}
LEARNING_RATES = [3e-3, 1e-2, 3e-2]
FACTORS = [0.03, 0.1, 0.3]
FACTOR_METHODS, FACTOR_STEPS = ["lora", "qahira"], 20
TUNING_SEED = 1000
# Ranks at which the numbers of trained parameters come closest (QA-HiRA has none: the rank only scales it).
RANKS = {
    "tiny-llama": {"lora": 4, "qbara": 4, "qalora": 7, "qahira": 1},
    "smollm2": {"lora": 11, "qbara": 11, "qalora": 21, "qahira": 1},
}


def fine_tune(options, model, bits, method, seed, lr, steps=STEPS):
    """One run, unless the log has it; returns its line."""
    wanted = {"model": model, "bits": bits, "method": method, "seed": seed, "lr": lr, "steps": steps}
    return once(options.log, wanted, lambda: run(options, **wanted))


def run(options, model, bits, method, seed, lr, steps):
    rank = RANKS[model][method]
    alpha = GROUP if method == "qahira" else rank
    with tempfile.TemporaryDirectory() as folder:
        figures = pathlib.Path(folder) / "figures.json"
        command = [options.program, *METHODS[method], "--scheme", f"affine{bits}:{GROUP}"]
        command += ["--rank", str(rank), "--alpha", str(alpha), "--lr", str(lr), "--seed", str(seed)]
        command += ["--steps", str(steps), "--batch", str(BATCH), "--seq-len", str(LENGTH)]
        command += ["--schedule", "linear", "--warmup", "5", "--clip", "1"]
        command += ["--data", TEXT / "shift_train_moby.txt", "--out", folder, "--json", figures]
        if model == "smollm2":
            command += ["--model", options.smollm2, "--eval", ROOT / "testdata/text/moby_ch100_smollm2_10240.u16le"]
            command += ["--window", "512"]
        else:
            command += ["--eval", TEXT / "shift_test_moby.u16le"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        found = json.loads(figures.read_text())
    return {
        "rank": rank,
        "alpha": alpha,
        "trainable_parameters": found["trainable_parameters"],
        "loss_before": math.log(found["perplexity_before"]),
        "loss_after": math.log(found["perplexity_after"]),
        "tokens_per_second": found["tokens_per_second"],
        "peak_rss_bytes": found["peak_rss_bytes"],
    }


def tuned(options, method):
    """The learning rate that is best on the embedded model at 4 bits."""
    runs = [fine_tune(options, "tiny-llama", 4, method, TUNING_SEED, lr) for lr in LEARNING_RATES]
    return min(runs, key=lambda run: run["loss_after"])["lr"]


def factor(options, rates):
    """What to multiply the embedded model's learning rates with for SmolLM2."""
    def loss(factor):
        runs = (fine_tune(options, "smollm2", 4, method, TUNING_SEED, factor * rates[method], FACTOR_STEPS)
                for method in FACTOR_METHODS)
        return sum(run["loss_after"] for run in runs)
    return min(FACTORS, key=loss)


def table(options):
    runs = [run for run in read_log(options.log) if run["seed"] != TUNING_SEED]
    print("| model | method | learning rate | trained parameters | 4 bits | 3 bits | 2 bits |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in RANKS:
        for method in METHODS:
            mine = [run for run in runs if (run["model"], run["method"]) == (model, method)]
            if not mine:
                continue
            cells = []
            for bits in (4, 3, 2):
                losses = [run["loss_after"] for run in mine if run["bits"] == bits]
                spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
                cells.append(f"{statistics.mean(losses):.4f}{spread}" if losses else "")
            parameters = mine[0]["trainable_parameters"]
            print(f"| {model} | {method} | {mine[0]['lr']:.1g} | {parameters:,} | {' | '.join(cells)} |")
        for bits in (4, 3, 2):
            before = [run["loss_before"] for run in runs if (run["model"], run["bits"]) == (model, bits)]
            if before:
                print(f"{model}, {bits} bits, before: {before[0]:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="the built example 03-finetune")
    parser.add_argument("--smollm2", help="the GGUF file that scripts/fetch-smollm2 fetches")
    parser.add_argument("--log", type=pathlib.Path, default=ROOT / "docs/results/balanced-rank.jsonl")
    parser.add_argument("--table", action="store_true", help="only print the table of the log")
    options = parser.parse_args()
    if not options.table:
        rates = {method: tuned(options, method) for method in METHODS}
        for bits in (4, 3, 2):
            for seed in (0, 1, 2):
                for method in METHODS:
                    fine_tune(options, "tiny-llama", bits, method, seed, rates[method])
        if options.smollm2:
            scale = factor(options, rates)
            for bits in (2, 3, 4):
                for method in METHODS:
                    fine_tune(options, "smollm2", bits, method, 0, scale * rates[method])
    table(options)


if __name__ == "__main__":
    main()
