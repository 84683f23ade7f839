"""Writes schedules.json: learning-rate factors of transformers' warm-up schedules at chosen steps.

    pip download --no-deps transformers==5.23.0 && python3 -m zipfile -e transformers-5.23.0-py3-none-any.whl DIR
    python3 make_schedules.py DIR

The factors come from transformers' own functions, taken out of its source one by one, so that torch isn't needed.
"""

import ast
import json
import math
import os
import sys

NAMES = [
    "_get_constant_schedule_with_warmup_lr_lambda",
    "_get_linear_schedule_with_warmup_lr_lambda",
    "_get_polynomial_decay_schedule_with_warmup_lr_lambda",
    "_get_cosine_schedule_with_warmup_lr_lambda",
]


def functions():
    path = os.path.join(sys.argv[1], "transformers", "optimization.py")
    with open(path) as file:
        tree = ast.parse(file.read())
    # The cosine function is defined twice; the last definition, with a final ratio, is the one in force.
    body = [node for node in tree.body if getattr(node, "name", None) in NAMES]
    scope = {"math": math}
    exec(compile(ast.Module(body=body, type_ignores=[]), path, "exec"), scope)
    return [scope[name] for name in NAMES]


def main():
    constant, linear, polynomial, cosine = functions()
    cases = []
    for warmup, total in [(10, 100), (0, 7), (3, 4), (20, 1000)]:
        steps = sorted({0, 1, warmup // 2, warmup, warmup + 1, (warmup + total) // 2, total - 1, total})
        both = {"num_warmup_steps": warmup, "num_training_steps": total}
        tenth = {"lr_init": 1.0, "lr_end": 0.1, "power": 1.0}
        kinds = [
            ("constant", lambda s: constant(s, num_warmup_steps=warmup)),
            ({"linear": {"final_ratio": 0.0}}, lambda s: linear(s, **both)),
            ({"linear": {"final_ratio": 0.1}}, lambda s: polynomial(s, **both, **tenth)),
            ({"cosine": {"final_ratio": 0.0}}, lambda s: cosine(s, num_cycles=0.5, **both)),
            ({"cosine": {"final_ratio": 0.1}}, lambda s: cosine(s, num_cycles=0.5, min_lr_rate=0.1, **both)),
        ]
        for kind, factor in kinds:
            cases.append({"kind": kind, "warmup": warmup, "total": total, "factors": [[s, factor(s)] for s in steps]})
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "schedules.json")
    with open(path, "w") as file:
        json.dump(cases, file)


main()
