"""Writes target_cases.json: which modules PEFT adapts for a configuration, and with which rank, alpha and scaling.

    pip download --no-deps peft==0.21.2 && python3 -m zipfile -e peft-0.21.2-py3-none-any.whl DIR
    python3 make_target_cases.py DIR

The answers come from PEFT's own functions, taken out of its sources one by one, so that torch isn't needed.
"""

import ast
import json
import math
import os
import re
import sys
from types import SimpleNamespace
from typing import Optional, Sequence


def load(path, names, scope):
    with open(path) as file:
        tree = ast.parse(file.read())
    body = [node for node in tree.body if getattr(node, "name", None) in names]
    assert {node.name for node in body} == set(names), path
    exec(compile(ast.Module(body=body, type_ignores=[]), path, "exec"), scope)


def llama(layers):
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return [f"model.layers.{i}.{part}" for i in range(layers) for part in parts] + ["lm_head"]


def nested():
    parts = ["attn.q_proj", "experts.0.up_proj", "experts.1.up_proj"]
    return [f"model.blocks.{i}.{part}" for i in range(3) for part in parts] + ["h.1.q_proj", "q_proj", "xq_proj"]


MODELS = {"llama12": llama(12), "nested": nested()}
Q1 = "model.layers.1.self_attn.q_proj"
CASES = [
    ("llama12", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama12", {"target_modules": ["self_attn.q_proj", Q1, "lm_head", "absent_proj"]}),
    ("llama12", {"target_modules": ["proj", "_proj", "q_pro"]}),
    ("llama12", {"target_modules": r".*\.(q|v)_proj"}),
    ("llama12", {"target_modules": r"model\.layers\.[0-3]\.mlp.*|lm_head"}),
    ("llama12", {"target_modules": r"q_proj"}),
    ("llama12", {"target_modules": r"model.layers.1.self_attn.q_proj$"}),
    ("llama12", {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.3.mlp.down_proj", "1.self_attn.q_proj"]}),
    ("llama12", {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.1\d?\..*"}),
    ("llama12", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1, 11]}),
    ("llama12", {"target_modules": ["q_proj", "model.layers.7.mlp.up_proj"], "layers_to_transform": 2}),
    ("llama12", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama12", {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "layers"}),
    ("llama12", {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": ["h", "layers"]}),
    ("llama12", {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": ["h"]}),
    ("llama12", {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": []}),
    ("nested", {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1]}),
    ("nested", {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1], "layers_pattern": ["experts"]}),
    ("nested", {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]}),
    ("nested", {"target_modules": ["q_proj"]}),
    ("llama12", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 4, Q1: 2}, "alpha_pattern": {"up_proj": 64}}),
    ("llama12", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {Q1: 2, "q_proj": 4}, "alpha_pattern": {"layers.1.*": 1, "q_proj|up_proj": 3}}),
    ("llama12", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"layers\.(0|1)\..*": 32, "up_proj": 5}, "use_rslora": True}),
    ("llama12", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"proj": 3, "lf_attn.k_proj": 7, ".*k_proj": 12}}),
    ("llama12", {"target_modules": ["o_proj"], "use_rslora": True, "alpha_pattern": {"^model.layers.2.self_attn.o_proj": 2.5}}),
]


def answer(scope, model, changes):
    fields = dict(r=8, lora_alpha=16, use_rslora=False, rank_pattern={}, alpha_pattern={}, modules_to_save=None)
    config = SimpleNamespace(**{**fields, **changes})
    for name in MODELS[model]:
        if not scope["check_target_module_exists"](config, name):
            continue
        r = config.rank_pattern.get(scope["get_pattern_key"](config.rank_pattern.keys(), name), config.r)
        alpha = config.alpha_pattern.get(scope["get_pattern_key"](config.alpha_pattern.keys(), name), config.lora_alpha)
        yield {"path": name, "r": r, "alpha": alpha, "scaling": alpha / (math.sqrt(r) if config.use_rslora else r)}


def main():
    scope = {"re": re, "Optional": Optional, "Sequence": Sequence}
    root = os.path.join(sys.argv[1], "peft")
    load(os.path.join(root, "tuners", "tuners_utils.py"), ["_ExcludedModule", "check_target_module_exists"], scope)
    load(os.path.join(root, "utils", "other.py"), ["match_target_against_key", "get_pattern_key"], scope)
    cases = [{"model": m, "config": c, "adapted": list(answer(scope, m, c))} for m, c in CASES]
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "target_cases.json")
    with open(path, "w") as file:
        json.dump({"models": MODELS, "cases": cases}, file, indent=1)


main()
