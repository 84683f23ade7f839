"""Writes hqq_reference.json: scales and zero points of the Python package hqq 0.2.8.

    pip download --no-deps --no-binary :all: hqq==0.2.8 && tar xf hqq-0.2.8.tar.gz
    pip install numpy==2.4.6
    python make_hqq_reference.py hqq-0.2.8

The package's own functions are run, taken from its source files, on numpy arrays that answer to the few names of
torch which they use; so no torch is needed. Arithmetic is f32, as the package's is on a CPU.
"""

import ast
import json
import pathlib
import sys
import types
import typing

import numpy as np

D_INPUT = 128


class Tensor(np.ndarray):
    """A numpy array with torch's method names."""

    def float(self):
        return self.astype(np.float32)

    def to(self, same=None, dtype=None, device=None):
        return self if dtype is None else self.astype(dtype)

    device = "cpu"

    def numel(self):
        return self.size

    def min(self, axis, keepdim):
        return (self.view(np.ndarray).min(axis=axis, keepdims=keepdim).view(Tensor),)

    def max(self, axis, keepdim):
        return (self.view(np.ndarray).max(axis=axis, keepdims=keepdim).view(Tensor),)

    def mean(self):
        return tensor([np.mean(self.view(np.ndarray), dtype=np.float32)])

    def clamp(self, min=None, max=None):
        return np.clip(self, min, max)

    def clamp_(self, min=None, max=None):
        return np.clip(self, min, max, out=self)

    def clamp_min_(self, min):
        return np.maximum(self, np.float32(min), out=self)

    def round_(self):
        return np.rint(self, out=self)

    def abs(self):
        return np.abs(self)

    def sub_(self, other):
        self -= other
        return self

    def mul_(self, other):
        self *= other
        return self

    def pow(self, exponent):
        with np.errstate(divide="ignore"):
            return np.power(self, np.float32(exponent))


def tensor(array):
    return np.ascontiguousarray(array, dtype=np.float32).view(Tensor)


def scalar(value, dtype=None, device=None):
    return tensor([value])


torch = types.SimpleNamespace(
    Tensor=Tensor,
    dtype=type,
    float32=np.float32,
    inf=np.inf,
    device=lambda name: types.SimpleNamespace(type=name),
    tensor=scalar,
    round=np.rint,
    abs=np.abs,
    sign=np.sign,
    pow=lambda x, exponent: x.pow(exponent),
    mean=lambda x, axis, keepdim: np.mean(x.view(np.ndarray), axis=axis, keepdims=keepdim, dtype=np.float32).view(Tensor),
    where=lambda condition, a, b: np.where(condition, a, b).astype(np.float32).view(Tensor),
    full_like=np.full_like,
    inference_mode=lambda: lambda function: function,
    cuda=types.SimpleNamespace(empty_cache=lambda: None),
)


def take(path, names, scope):
    """Runs the named top-level definitions of a Python file in `scope`."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    assert {node.name for node in tree.body} == set(names), path
    exec(compile(tree, str(path), "exec"), scope)


def package(root):
    class AnyPacking:
        def __getattr__(self, name):
            return None

    scope = {
        "torch": torch,
        "np": np,
        "Tensor": Tensor,
        "Union": typing.Union,
        "float32": np.float32,
        "float16": np.float16,
        "uint8": np.uint8,
        "int32": np.int32,
        "BitPack": AnyPacking(),
        "is_divisible": lambda a, b: a % b == 0,
    }
    core = root / "hqq" / "core"
    solver = ["shrink_lp_op", "optimize_weights_proximal_legacy_step", "optimize_weights_proximal_legacy"]
    take(core / "optimize.py", solver, scope)
    scope["optimize_weights_proximal"] = scope["optimize_weights_proximal_legacy"]
    take(core / "quantize.py", ["Quantizer"], scope)
    return scope["Quantizer"]


def main():
    quantizer = package(pathlib.Path(sys.argv[1]))
    random = np.random.default_rng(71)
    # "narrow" is as wide as a model's weights: no residual survives shrinking. In "wide" many do.
    weights = {
        name: np.round(size * random.standard_t(4, (5, D_INPUT)), digits).astype(np.float32)
        for name, size, digits in [("narrow", 0.05, 5), ("wide", 1.0, 4)]
    }
    cases = []
    for name, weight in weights.items():
        for bits, group in [(2, 64), (3, 32), (4, 64), (4, 128), (8, 64)]:
            codes, meta = quantizer.quantize(
                tensor(weight), nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu"
            )
            scale, zero = np.asarray(meta["scale"]), np.asarray(meta["zero"])
            dense = ((np.asarray(codes) - zero) * scale).reshape(weight.shape)
            cases.append({
                "weight": name,
                "bits": bits,
                "group": group,
                "scale": [float(str(x)) for x in scale.ravel()],
                "zero": [float(str(x)) for x in zero.ravel()],
                "mean_absolute_error": float(np.abs(weight.astype(float) - dense).mean()),
            })
    result = {
        "source": "hqq 0.2.8, run by make_hqq_reference.py",
        "d_input": D_INPUT,
        "weights": {name: [float(str(x)) for x in weight.ravel()] for name, weight in weights.items()},
        "cases": cases,
    }
    path = pathlib.Path(__file__).with_name("hqq_reference.json")
    lines = ",\n".join(json.dumps(case) for case in cases)
    result["cases"] = []
    path.write_text(json.dumps(result).replace('"cases": []', '"cases": [\n' + lines + "]") + "\n")


main()
