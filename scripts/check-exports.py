#!/usr/bin/env python3
"""Compares the two exports of the example 06-merge-and-export, read without Kiln.

    pip install gguf==0.19.0 safetensors numpy
    cargo run --release -p kiln-examples --example 06-merge-and-export -- --out EXPORT
    python3 scripts/check-exports.py EXPORT

Every linear of the blocks is read from EXPORT/model.gguf by the package gguf and from EXPORT/mlx by the formula of MLX's
affine packing. Both hold the same codes, and scales and offsets rounded to f16, so all weights must be equal bit for bit.
"""

import json
import pathlib
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def unpermute(weight, heads):
    """GGUF's rows of q and k, whose rotary pairs are neighbours, in the order of Hugging Face: halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def from_gguf(path, config):
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights, types = {}, {}
    for tensor in GGUFReader(path).tensors:
        parts = tensor.name.split(".")
        if len(parts) == 4 and parts[2] in NAMES:
            weight = dequantize(tensor.data, tensor.tensor_type)
            if parts[2] in heads:
                weight = unpermute(weight, heads[parts[2]])
            name = f"model.layers.{parts[1]}.{NAMES[parts[2]]}"
            weights[name], types[name] = weight, tensor.tensor_type.name
    return weights, types


def from_mlx(folder, config, names):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    bits, group = config["quantization"]["bits"], config["quantization"]["group_size"]
    weights = {}
    for name in names:
        codes = tensors[f"{name}.weight"]
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        codes = ((codes[..., None] >> shifts) & (2**bits - 1)).reshape(codes.shape[0], -1).astype(np.float32)
        scales, offsets = (
            np.repeat(tensors[f"{name}.{part}"].astype(np.float32), group, axis=1) for part in ("scales", "biases")
        )
        weights[name] = scales * codes + offsets
    return weights


def main():
    folder = pathlib.Path(sys.argv[1])
    config = json.loads((folder / "mlx/config.json").read_text())
    ours, types = from_gguf(folder / "model.gguf", config)
    assert len(ours) == len(NAMES) * config["num_hidden_layers"], f"{len(ours)} linears in model.gguf"
    different = 0
    for name, weight in from_mlx(folder / "mlx", config, ours).items():
        unequal = int(np.count_nonzero(weight.view(np.uint32) != ours[name].astype(np.float32).view(np.uint32)))
        different += unequal
        if unequal:
            print(f"{name}: {unequal} of {weight.size} weights differ, by {np.abs(weight - ours[name]).max():.2e} at most")
    print(f"{len(ours)} linears of type {', '.join(sorted(set(types.values())))}: {different} weights differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
