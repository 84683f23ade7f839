"""Pruned checkpoints against transformers.

    python scripts/check-pruned.py compare FOLDER
        Opens every folder below FOLDER that has a config.json with AutoModelForCausalLM and compares its logits with
        those in the folder's logits.safetensors (ids, logits). The folders come from
        KILN_PRUNED_OUT=FOLDER cargo test --release -p kiln-pruning for_transformers

    python scripts/check-pruned.py opt-reference
        Writes testdata/pruning/opt_hidden.safetensors: OPT with channels of its residual stream zeroed and LayerNorms
        that take mean and variance over the others, which is what cutting the channels out must give.

Needs torch, transformers and safetensors.
"""

import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4


def compare(folder):
    failures = 0
    for config in sorted(pathlib.Path(folder).glob("*/config.json")):
        golden = load_file(config.parent / "logits.safetensors")
        model, info = AutoModelForCausalLM.from_pretrained(
            config.parent, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        problems = {key: value for key, value in info.items() if value}
        with torch.no_grad():
            logits = model(golden["ids"].long()).logits
        difference = (logits - golden["logits"]).abs().max().item()
        count = sum(p.numel() for p in model.parameters())
        good = difference <= TOLERANCE and not problems
        failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {config.parent.name}: {difference:.2e}, {count} parameters {problems or ''}")
    return failures


class KeptNorm(torch.nn.Module):
    def __init__(self, norm, kept):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x):
        y = torch.zeros_like(x)
        part = x[..., self.kept]
        mean = part.mean(-1, keepdim=True)
        variance = part.var(-1, unbiased=False, keepdim=True)
        y[..., self.kept] = (part - mean) / torch.sqrt(variance + self.norm.eps) * self.norm.weight[
            self.kept
        ] + self.norm.bias[self.kept]
        return y


def opt_reference():
    folder = ROOT / "testdata/tiny/opt-f32"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    width = model.config.hidden_size
    kept = torch.tensor([i for i in range(width) if i % 4 != 1])
    gone = torch.tensor([i for i in range(width) if i % 4 == 1])
    decoder = model.model.decoder
    with torch.no_grad():
        for table in (decoder.embed_tokens, decoder.embed_positions):
            table.weight[:, gone] = 0
        for layer in decoder.layers:
            for linear in (layer.self_attn.out_proj, layer.fc2):
                linear.weight[gone] = 0
                linear.bias[gone] = 0
            layer.self_attn_layer_norm = KeptNorm(layer.self_attn_layer_norm, kept)
            layer.final_layer_norm = KeptNorm(layer.final_layer_norm, kept)
        decoder.final_layer_norm = KeptNorm(decoder.final_layer_norm, kept)
        ids = load_file(folder / "golden.safetensors")["input_ids"]
        logits = model(ids.long()).logits[:, -4:]
    out = ROOT / "testdata/pruning/opt_hidden.safetensors"
    out.parent.mkdir(exist_ok=True)
    save_file({"kept": kept.int(), "logits_last4": logits.contiguous()}, out)
    print(out, logits.shape)


if __name__ == "__main__":
    if sys.argv[1:2] == ["opt-reference"]:
        opt_reference()
    elif sys.argv[1:2] == ["compare"] and len(sys.argv) == 3:
        sys.exit(compare(sys.argv[2]))
    else:
        sys.exit(__doc__)
