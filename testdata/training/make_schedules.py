"""Writes schedules.json: learning-rate factors of transformers' warm-up schedules at chosen steps.

    pip download --no-deps transformers==5.24.0 && python3 -m zipfile -e transformers-5.24.0-py3-none-any.whl DIR
    python3 make_schedules.py DIR [OUT]

The factors come from transformers' own functions, taken out of its source one by one, so that torch isn't needed. The
kinds of the second list have two steps past the last one too.
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
    "_get_inverse_sqrt_schedule_lr_lambda",
    "_get_wsd_scheduler_lambda",
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda",
]
SHAPES = [(10, 100), (0, 7), (3, 4), (20, 1000)]


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
    constant, linear, polynomial, cosine, inverse_sqrt, stable, restarts = functions()
    cases = []

    def add(kinds, warmup, total, steps):
        for kind, factor in kinds:
            cases.append({"kind": kind, "warmup": warmup, "total": total, "factors": [[s, factor(s)] for s in steps]})

    for warmup, total in SHAPES:
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
        add(kinds, warmup, total, steps)

    for warmup, total in SHAPES:
        both = {"num_warmup_steps": warmup, "num_training_steps": total}
        timescale, cycles, ratio, decay_steps = 30, 3, 0.1, max(1, total // 4)
        three_stages = {
            "num_warmup_steps": warmup,
            "num_stable_steps": total - warmup - decay_steps,
            "num_decay_steps": decay_steps,
            "warmup_type": "linear",
            "min_lr_ratio": ratio,
            "num_cycles": 0.5,
        }
        steps = {0, 1, warmup // 2, warmup, warmup + 1, (warmup + total) // 2}
        steps |= {warmup + (total - warmup) * k // (2 * cycles) for k in range(1, 2 * cycles)}
        steps |= {total - decay_steps, total - decay_steps + 1, total - decay_steps // 2}
        steps |= {total - 1, total, total + 1, total + 50}
        kinds = [
            (
                {"inverse_sqrt": {"timescale": timescale}},
                lambda s: inverse_sqrt(s, num_warmup_steps=warmup, timescale=timescale),
            )
        ]
        for name, decay in [("linear", "linear"), ("cosine", "cosine"), ("one_minus_sqrt", "1-sqrt")]:
            kinds.append(
                (
                    {"warmup_stable_decay": {"decay_steps": decay_steps, "decay": name, "final_ratio": ratio}},
                    lambda s, decay=decay: stable(s, decay_type=decay, **three_stages),
                )
            )
        kinds.append(
            ({"cosine_with_restarts": {"cycles": cycles}}, lambda s: restarts(s, num_cycles=cycles, **both))
        )
        add(kinds, warmup, total, sorted(steps))

    folder = sys.argv[2] if len(sys.argv) > 2 else os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "schedules.json"), "w") as file:
        json.dump(cases, file)


main()
