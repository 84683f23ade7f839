#!/usr/bin/env python3
"""Makes `adamw8bit.safetensors` and `adamw8bit.json`: five steps of bitsandbytes' blockwise 8-bit AdamW.

    pip install torch==2.15.0 bitsandbytes==0.50.2 numpy safetensors
    OMP_NUM_THREADS=1 python3 make_adamw8bit.py OUT

`kernel.*`: what the CUDA kernel kOptimizerStatic8bit2StateBlockwise does, written out here in f32 without its fast
divisions, powers and fused multiply-adds, and not run on a GPU. `cpu.*`: bitsandbytes itself on the CPU (its function
takes 1000 values too if min_8bit_size is 1), which quantizes by another rule. The notes say how they differ.
"""

import json
import sys

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.functional import create_dynamic_map
from safetensors.numpy import save_file

(out,) = sys.argv[1:]
STEPS, BLOCK, LR, BETA1, BETA2, EPS, DECAY = 5, 256, 1e-3, 0.9, 0.999, 1e-8, 0.01
SIZES = {"small": 1000, "large": 4096}
f32 = np.float32
maps = {"signed": create_dynamic_map(signed=True).numpy(), "unsigned": create_dynamic_map(signed=False).numpy()}


def quantize_2d(code, lowest, x):
    """The kernel's search: seven halvings from code 127, then the midpoint to a neighbour."""
    pivot, lower_pivot, upper_pivot = (np.full(x.shape, start) for start in (127, 0, 255))
    lower, upper, value = np.full(x.shape, f32(lowest)), np.full(x.shape, f32(1)), code[pivot]
    for i in (64, 32, 16, 8, 4, 2, 1):
        above = x > value
        lower_pivot, lower = np.where(above, pivot, lower_pivot), np.where(above, value, lower)
        upper_pivot, upper = np.where(above, upper_pivot, pivot), np.where(above, upper, value)
        pivot = np.where(above, pivot + i, pivot - i)
        value = code[pivot]
    up = np.where(x > (upper + value) * f32(0.5), upper_pivot, pivot)
    down = np.where(x < (lower + value) * f32(0.5), lower_pivot, pivot)
    return np.where(x > value, up, down)


class Kernel:
    def __init__(self, start):
        self.p = start.copy()
        blocks = -(-len(start) // BLOCK)
        self.codes = [np.zeros(len(start), np.uint8) for _ in range(2)]
        self.absmax = [np.zeros(blocks, f32) for _ in range(2)]

    def step(self, g, number):
        beta1, beta2, lr, one = f32(BETA1), f32(BETA2), f32(LR), f32(1)
        correction1 = one - f32(float(beta1) ** number)
        correction2 = np.sqrt(one - f32(float(beta2) ** number))
        step_size = -lr * correction2 / correction1
        owner = np.arange(len(g)) // BLOCK
        m, v = (code[c] * absmax[owner] for code, c, absmax in zip(maps.values(), self.codes, self.absmax))
        v = v * beta2 + (one - beta2) * g * g
        m = m * beta1 + (one - beta1) * g
        self.absmax = [np.maximum.reduceat(np.abs(state), np.arange(0, len(g), BLOCK)) for state in (m, v)]
        self.p = self.p + step_size * (m / (np.sqrt(v) + correction2 * f32(EPS)))
        self.p = self.p * (one - lr * f32(DECAY))
        m_codes = quantize_2d(maps["signed"], -1, m / self.absmax[0][owner])
        v_codes = quantize_2d(maps["unsigned"], 0, v / self.absmax[1][owner])
        # The first state keeps its sign; a negative value next to 0 gets the code below 0.
        wrong = np.signbit(maps["signed"][m_codes]) != np.signbit(m)
        m_codes = np.where(wrong, np.where(m > 0, m_codes + 1, m_codes - 1), m_codes)
        self.codes = [m_codes.astype(np.uint8), v_codes.astype(np.uint8)]
        for array in (self.p, m, v, *self.absmax):
            assert array.dtype == f32


class Cpu:
    def __init__(self, start):
        self.parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
        self.optimizer = bitsandbytes.optim.AdamW8bit(
            [self.parameter], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, min_8bit_size=1
        )

    def step(self, g, number):
        self.parameter.grad = torch.from_numpy(g.copy())
        self.optimizer.step()
        state = self.optimizer.state[self.parameter]
        self.p = self.parameter.detach().numpy()
        self.codes = [state[f"state{i}"].numpy() for i in (1, 2)]
        self.absmax = [state[f"absmax{i}"].numpy() for i in (1, 2)]


def run(optimizer, grads, every=1):
    rows = [[] for _ in range(5)]
    for number, g in enumerate(grads, 1):
        optimizer.step(g.astype(f32), number)
        for row, value in zip(rows, (optimizer.p[::every], *optimizer.codes, *optimizer.absmax)):
            row.append(value.copy())
    return dict(zip(["params", "state1", "state2", "absmax1", "absmax2"], map(np.stack, rows)))


random = np.random.default_rng(81)
found = {f"map.{name}": code for name, code in maps.items()}
runs = {}
for size, count in SIZES.items():
    start = random.normal(0, 0.05, count).astype(np.float16)
    spread = 10.0 ** random.uniform(-3, 0, count)
    grads = (random.normal(0, 0.3, (STEPS, count)) * spread).astype(np.float16)
    grads[:, ::97] = 0
    found |= {f"{size}.start": start, f"{size}.grads": grads}
    runs[f"kernel.{size}"] = run(Kernel(start.astype(f32)), grads, 1 if size == "small" else 4)
    if size == "small":
        runs[f"cpu.{size}"] = run(Cpu(start.astype(f32)), grads)
found |= {f"{name}.{key}": value for name, values in runs.items() for key, value in values.items()}

kernel, cpu = runs["kernel.small"], runs["cpu.small"]
notes = {
    "versions": {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__.split("+")[0]},
    "lr": LR,
    "betas": [BETA1, BETA2],
    "eps": EPS,
    "weight_decay": DECAY,
    "block": BLOCK,
    "large_params": "kernel.large.params holds every fourth value, the first included",
    "min_8bit_size": "optim/optimizer.py Optimizer2State.init_state: a tensor of fewer than min_8bit_size (4096) values "
    "gets two f32 states and optimizer_update_32bit, ordinary AdamW; one of 4096 or more gets u8 states in blocks of 256 "
    "of the flattened tensor, the last one shorter. States and absmax begin as zero bytes.",
    "kernel": {
        "source": "csrc/kernels.cu kOptimizerStatic8bit2StateBlockwise, quantize_2D, as of commit 95f9af3 "
        "(0.50.2.dev0). CMakeLists.txt compiles it with --use_fast_math: a GPU's last bits differ.",
        "order": "state = map[code] * absmax; v = v b2 + (1 - b2) g g; m = m b1 + (1 - b1) g; absmax = max |state| of the "
        "block; p += step_size (m / (sqrt(v) + c2 eps)) with the states before quantization, c1 = 1 - b1^t, c2 = sqrt(1 - "
        "b2^t), step_size = -lr c2 / c1; then p *= 1 - lr weight_decay; then both states are quantized. All in f32, 1 - "
        "b2 too (0.00099998713). A gradient that isn't finite leaves p, and sets both states to 0.",
        "rounding": "x = state / absmax to the nearest entry of the map. Binary search: pivot 127, seven times up or down "
        "by 64, 32, .. 1, up if x > map[pivot]; the last pivot is even. If x > map[pivot]: the code above if x > midpoint, "
        "else pivot; otherwise the code below if x < midpoint, else pivot. So a tie takes the even code. Midpoint (a + b) "
        "/ 2 in f32.",
        "sign": "of m only: if the sign bit of map[code] isn't that of m, code + 1 where m > 0, else code - 1. Code 127 of "
        "the signed map is 0, so a small negative m gets code 126, a small positive one may get 127. The signed map has 1 "
        "but not -1: the smallest entry is -0.9929687.",
        "zero_block": "a block whose states are all 0 divides 0 by 0: the search gives code 0, the sign rule makes that of "
        "m 255; with absmax 0 they stand for 0. There is none in this file.",
    },
    "cpu": {
        "source": "backends/cpu/ops.py _optimizer_update_8bit_blockwise_cpu, csrc/cpu_ops.cpp quantize_cpu_impl",
        "order": "states as above, with 1 - b as f64; p *= 1 - lr weight_decay first; p -= lr / c1 m / (sqrt(v) / c2 + eps)",
        "rounding": "x = state * (1 / absmax); table of 65536 codes, index int((x + 1) / 2 * 65535 + 0.5), entry i the "
        "nearest code to -1 + 2 i / 65535, ties to the lower. x is so rounded to a grid of 3.05e-5: 0 becomes code 131 "
        "(2.1e-5) of the signed and 7 (1.6e-5) of the unsigned map, and no code nearer to 0 than 123, 131 and 7 comes out, so "
        "that values without a gradient move. No rule for the sign. A block of zeros gets code 0.",
        "other": "backends/default/ops.py: torch.bucketize on the midpoints, ties to the lower; "
        "backends/triton/kernels_8bit_quant.py: nearest of the two neighbours, ties to the lower; neither keeps the sign.",
    },
    "kernel_against_cpu_small": {
        "codes_that_differ": {
            key: [int((a != b).sum()) for a, b in zip(kernel[key], cpu[key])] for key in ("state1", "state2")
        },
        "max_difference_of_params": [float(np.abs(a - b).max()) for a, b in zip(kernel["params"], cpu["params"])],
    },
}
with open(f"{out}/adamw8bit.json", "w") as file:
    json.dump(notes, file, indent=1)
save_file(found, f"{out}/adamw8bit.safetensors")
