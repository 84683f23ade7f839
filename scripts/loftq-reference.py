#!/usr/bin/env python3
"""LoftQ at 2 bits by torch's own operations, and by variants that differ in the last bits: errors of weights and perplexity.

Needs torch, transformers and gguf. `--model` is the folder of the GGUF file that scripts/fetch-smollm2 prints.
"""

import argparse
import math
import pathlib

import numpy as np
import torch
from transformers import AutoModelForCausalLM

GROUP, LEVELS, RANK, STEPS, WINDOW = 64, 3, 16, 5, 512


def rounded(weight, half):
    """To nearest, by group: scale (max - min) / 3, zero point -round(min / scale)."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / LEVELS
    if half:
        scale = scale.half().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = -torch.round(low / scale)
    codes = (torch.round(groups / scale) + zero).clamp(0, LEVELS)
    return ((codes - zero) * scale).reshape(weight.shape)


def leading(residual, iterations):
    """The product of the leading singular vectors: exact, or by so many subspace iterations."""
    if iterations is not None:
        u, s, v = torch.svd_lowrank(residual, q=RANK + 4, niter=iterations)
        return (u[:, :RANK] * s[:RANK]) @ v.T[:RANK]
    wide = residual.shape[0] <= residual.shape[1]
    gram = (residual @ residual.T if wide else residual.T @ residual).double()
    vectors = torch.linalg.eigh(gram)[1][:, -RANK:].float()
    return vectors @ (vectors.T @ residual) if wide else (residual @ vectors) @ vectors.T


def loftq(weight, half=False, iterations=None, noise=0.0, best=False):
    product, kept, least = torch.zeros_like(weight), None, math.inf
    for _ in range(STEPS):
        quantized = rounded(weight - product, half)
        product = leading(weight - quantized, iterations)
        if noise:
            product = product * (1 + noise * torch.randn_like(product))
        error = (weight - quantized - product).norm().item()
        if not best or error < least:
            kept, least = quantized + product, error
    return kept


def perplexity(model, ids):
    total = count = 0
    for window in ids.split(WINDOW):
        logits = model(window[None]).logits[0, :-1]
        scores = torch.log_softmax(logits.float(), -1).gather(1, window[1:, None])
        total, count = total - scores.sum().item(), count + len(scores)
    return math.exp(total / count)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    options = parser.parse_args()
    root = pathlib.Path(__file__).parent.parent
    text = np.fromfile(root / "testdata/text/moby_ch100_smollm2_10240.u16le", dtype="<u2")
    ids = torch.from_numpy(text.astype(np.int64))
    file = next(options.model.glob("SmolLM2*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(options.model, gguf_file=file.name, dtype=torch.float32).eval()
    linears = {name: weight for name, weight in model.named_parameters() if name.endswith("proj.weight")}
    originals = {name: weight.detach().clone() for name, weight in linears.items()}
    print("| variant | error of the weights | perplexity |\n| --- | --- | --- |")
    for name, variant in {
        "exact vectors, scales in f32, the last step": {},
        "the best step": {"best": True},
        "the product changed by 1e-3 of itself at random": {"noise": 1e-3},
        "scales in f16": {"half": True},
        "4 subspace iterations": {"iterations": 4},
        "4 subspace iterations, scales in f16, the best step": {"iterations": 4, "half": True, "best": True},
    }.items():
        torch.manual_seed(0)
        errors = []
        with torch.no_grad():
            for path, weight in linears.items():
                original = originals[path]
                weight.copy_(loftq(original, **variant))
                errors.append(((weight - original).norm() / original.norm()).item())
            print(f"| {name} | {np.mean(errors):.5f} | {perplexity(model, ids):.0f} |", flush=True)


if __name__ == "__main__":
    main()
