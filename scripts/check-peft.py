#!/usr/bin/env python3
"""Compares a LoRA adapter as Kiln computes it with the same adapter opened by Python's PEFT.

    pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 gguf==0.19.0 safetensors numpy
    cargo build --release -p kiln-examples --example logits
    python3 scripts/check-peft.py --gguf MODEL.gguf --adapter FOLDER \\
        --logits-program target/release/examples/logits --prompts "The capital of France is" "Call me Ishmael."

The reference is the GGUF file dequantised to f32 by transformers, with eager attention, and the adapter folder as
`PeftModel.from_pretrained` reads it. For each prompt it prints the largest absolute difference of the logits, without
and with the adapter, and how far the adapter moves them. Fails if a difference exceeds --tolerance, if PEFT holds
other adapter tensors than the file, or if the adapter moves nothing. Needs no network.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

# Before the libraries that read it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=pathlib.Path, required=True, help="the base model")
    parser.add_argument("--adapter", type=pathlib.Path, required=True, help="the adapter folder")
    parser.add_argument("--logits-program", type=pathlib.Path, required=True, help="the built example `logits`")
    parser.add_argument("--prompts", nargs="+", required=True, help="texts, each of two tokens or more")
    # Two correct f32 implementations differ by about 6e-5 in a logit of a 135M model, a wrong layout by whole units.
    parser.add_argument("--tolerance", type=float, default=2e-3, help="of a logit (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: %(default)s)")
    return parser.parse_args()


def load_base(gguf):
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def check_adapter_tensors(model, folder):
    """PEFT passes over names that it doesn't know, so what it holds is compared with the file."""
    held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = load_file(folder / "adapter_model.safetensors")
    if held.keys() != stored.keys():
        sys.exit(f"PEFT and the file differ in {sorted(held.keys() ^ stored.keys())[:8]}")
    for name, tensor in stored.items():
        if not torch.equal(held[name].float(), tensor.float()):
            sys.exit(f"{name}: PEFT holds other values than the file")
    return len(stored)


def reference_logits(model, ids):
    with torch.no_grad():
        return [model(input_ids=row).logits.float() for row in ids]


def kiln_logits(options, ids, adapter=None):
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "ids.safetensors"), os.path.join(folder, "logits.safetensors")
        for row in ids:
            save_file({"input_ids": row}, source)
            command = [options.logits_program.resolve(), "--model", options.gguf, "--ids", source, "--out", target]
            command += ["--adapter", adapter] if adapter else []
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.append(load_file(target)["logits"])
    return found


def loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


def difference(left, right):
    if left.shape != right.shape:
        sys.exit(f"logits: expected {tuple(right.shape)}, found {tuple(left.shape)}")
    # A NaN stays one, and fails every comparison below.
    return (left - right).abs().max().item()


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    versions = {"torch": torch, "transformers": transformers, "peft": peft}
    print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()))

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(options.gguf.parent), gguf_file=options.gguf.name)
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in options.prompts]
    model = load_base(options.gguf)
    base = reference_logits(model, ids)
    model = peft.PeftModel.from_pretrained(model, str(options.adapter)).eval()
    print(f"PEFT holds all {check_adapter_tensors(model, options.adapter)} tensors of the adapter")
    adapted = reference_logits(model, ids)
    ours_base = kiln_logits(options, ids)
    ours_adapted = kiln_logits(options, ids, options.adapter)

    passed = True
    for i, row in enumerate(ids):
        without, with_adapter = difference(ours_base[i], base[i]), difference(ours_adapted[i], adapted[i])
        moved = difference(adapted[i], base[i])
        agree = (ours_adapted[i].argmax(-1) == adapted[i].argmax(-1)).float().mean().item()
        # An adapter that moved less than the tolerance would be tested by nothing.
        passed &= without <= options.tolerance and with_adapter <= options.tolerance and moved > options.tolerance
        print(f"{row.shape[1]} tokens {options.prompts[i]!r}: largest difference {without:.3e} without the adapter, "
              f"{with_adapter:.3e} with it; the adapter moves logits by up to {moved:.3f}; "
              f"loss {loss(base[i], row):.6f} -> {loss(adapted[i], row):.6f} "
              f"(Kiln {loss(ours_base[i], row):.6f} -> {loss(ours_adapted[i], row):.6f}); "
              f"same best token at {agree:.0%} of positions")
    print("passed" if passed else f"FAILED: tolerance {options.tolerance}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
