"""One training step of Kiln and of Python's PEFT, alternately, in one go: tokens/s, peak memory, ratios of medians.

    cargo build --release -p kiln-benches --bin train-step
    python3 scripts/referee.py target/release/train-step SmolLM2-135M-Instruct.Q4_1.gguf

SmolLM2-135M, LoRA of rank 16 on all linears, AdamW, clipping, batch 4 x 256. Kiln: `affine4:64:f16`, operands of products
in f32 and in bf16. PEFT: the same shapes with random weights in bf16, adapters in f32, sdpa attention; needs torch,
transformers and peft. Each run is a process of its own; its step is the median of some steps after the first one.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time

BATCH, LENGTH = 4, 256


def peft_step(recompute, steps):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"))
    model.train()
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    seconds = []
    for _ in range(steps + 1):
        ids = torch.randint(0, 49152, (BATCH, LENGTH))
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak": peak, "torch": torch.__version__}))


def peft(options, recompute):
    command = [sys.executable, __file__, "--peft-step", "--steps", str(options.steps)] + ["--recompute"] * recompute
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found["seconds"], found["peak"]


def kiln(options, recompute, compute):
    sizes = [str(size) for size in (BATCH, LENGTH, options.steps)]
    command = [options.binary, options.model, "affine4:64:f16", "block" if recompute else "none", *sizes, compute]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, peak = re.search(r"step ([\d.]+) s, .* peak (\d+) MB", printed).groups()
    return float(seconds), float(peak) * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", nargs="?", help="the program train-step")
    parser.add_argument("model", nargs="?", help="SmolLM2-135M as a .gguf file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--recompute", action="store_true", help="recompute activations by block, on both sides")
    parser.add_argument("--peft-step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peft_step:
        return peft_step(options.recompute, options.steps)
    if options.model is None:
        parser.error("expected the program and the model")
    sides = {
        "Kiln f32": lambda: kiln(options, options.recompute, "f32"),
        "Kiln bf16": lambda: kiln(options, options.recompute, "bf16"),
        "PEFT bf16": lambda: peft(options, options.recompute),
    }
    measured = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            measured[name].append(side())
    median = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in measured.items()}
    tokens = BATCH * LENGTH
    for name, runs in measured.items():
        rates = ", ".join(f"{tokens / seconds:.0f}" for seconds, _ in runs)
        peak = max(peak for _, peak in runs) / 1e9
        print(f"{name:10} median {tokens / median[name]:6.0f} tokens/s ({rates}), peak {peak:.2f} GB")
    print(f"Kiln bf16 / Kiln f32  {median['Kiln f32'] / median['Kiln bf16']:.2f}")
    print(f"Kiln bf16 / PEFT bf16 {median['PEFT bf16'] / median['Kiln bf16']:.2f}")
    best = min(seconds for seconds, _ in measured["PEFT bf16"])
    print(f"Kiln bf16 / PEFT's best {best / median['Kiln bf16']:.2f}")


if __name__ == "__main__":
    main()
