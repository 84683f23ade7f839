#!/usr/bin/env python3
"""awq_reference.json: the scaling that AutoAWQ 0.2.9's own search chooses for small layers, without duo scaling.

    pip install torch==2.3.1 && pip download autoawq==0.2.9 --no-deps --no-binary :all: && tar xzf autoawq-0.2.9.tar.gz
    ./make_awq_reference.py autoawq-0.2.9/awq/quantize/quantizer.py

The package's module needs a GPU stack to be imported; the three functions used here don't, and are taken from its source as
they are. The errors by exponent are the definition's, with the package's quantizer.
"""

import ast
import json
import pathlib
import sys
import typing

import torch

NEEDED = ["pseudo_quantize_tensor", "_compute_best_scale", "_module_forward", "_compute_loss"]
GRID = 20


def awq_quantizer(path):
    module = ast.parse(path.read_text())
    (quantizer,) = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "AwqQuantizer"]
    quantizer.bases = []
    quantizer.body = [node for node in quantizer.body if isinstance(node, ast.FunctionDef) and node.name in NEEDED]
    names = {"torch": torch, "nn": torch.nn, "clear_memory": lambda *_: None, **vars(typing)}
    exec(compile(ast.Module(body=[quantizer], type_ignores=[]), path, "exec"), names)
    return names["AwqQuantizer"]


class Readers(torch.nn.Module):
    """Layers with the same inputs; their outputs side by side."""

    def __init__(self, weights):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for weight in weights:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight.clone()
            self.layers.append(layer)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


@torch.no_grad()
def case(quantizer, bits, group, d_outputs, spread, d_input=64, windows=3, rows=8):
    gains = (torch.randn(d_input) * spread).exp()
    x = (torch.randn(windows, rows, d_input) * gains * 1000).round() / 1000
    weights = [(torch.randn(d_output, d_input) * 500).round() / 10000 for d_output in d_outputs]
    readers = Readers(weights)
    awq = quantizer.__new__(quantizer)
    awq.w_bit, awq.group_size, awq.zero_point, awq.duo_scaling = bits, group, True, False
    awq.n_parallel_calib_samples, awq.max_chunk_memory = None, 1 << 30
    magnitudes = x.abs().view(-1, d_input).mean(0)
    expected = readers(x)
    best = awq._compute_best_scale(x, torch.ones(d_input), magnitudes, readers, list(readers.layers), expected, {})

    def factors(step):
        powers = magnitudes.pow(step / GRID).clamp(min=1e-4)
        return powers / (powers.max() * powers.min()).sqrt()

    errors = []
    for step in range(GRID):
        scaled = [awq.pseudo_quantize_tensor(weight * factors(step))[0] / factors(step) for weight in weights]
        found = torch.cat([x @ weight.T for weight in scaled], dim=-1)
        errors.append((found - expected).double().square().mean().item())
    step = min(range(GRID), key=errors.__getitem__)
    assert torch.allclose(factors(step), best.view(-1))

    def numbers(tensor):
        return [float(f"{value:.9g}") for value in tensor.flatten().tolist()]

    return {"bits": bits, "group": group, "windows": windows, "rows": rows, "d_input": d_input, "x": numbers(x),
            "weights": [numbers(weight) for weight in weights], "exponent": step / GRID, "factors": numbers(best),
            "mean_squared_errors": errors}


def main():
    torch.manual_seed(7)
    quantizer = awq_quantizer(pathlib.Path(sys.argv[1]))
    cases = [case(quantizer, 3, 16, [24], 1.5), case(quantizer, 4, 32, [16, 8], 0.2), case(quantizer, 2, 16, [8, 8, 8], 0.7)]
    pathlib.Path(__file__).with_name("awq_reference.json").write_text(json.dumps({"cases": cases}) + "\n")


if __name__ == "__main__":
    main()
