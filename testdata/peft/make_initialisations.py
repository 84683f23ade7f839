#!/usr/bin/env python3
"""Makes `initialisations.safetensors`: what PEFT makes of two linear layers with PiSSA, OLoRA, QA-LoRA and DoRA.

    pip install torch==2.15.0 peft==0.21.2 safetensors
    python3 make_initialisations.py initialisations.safetensors

Keys `NAME.SHAPE.*`, SHAPE `wide` (24 inputs, 10 outputs) or `tall` (10 inputs, 24 outputs), tensors in torch's
orientation: `weight` before, `residual` after the initialisation, `lora_A`, `lora_B`; of QA-LoRA (B not zero) and of
DoRA (with a bias, and all parts moved) `x`, `y` and the gradients of the sum of y · dy. QA-LoRA is run through PEFT's
own forward function of that variant.
"""

import sys

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import save_file

RANK, ALPHA = 4, 6.0
found = {}


class Model(torch.nn.Module):
    def __init__(self, d_input, d_output, bias):
        super().__init__()
        self.proj = torch.nn.Linear(d_input, d_output, bias=bias)


def adapted(shape, bias=False, **options):
    torch.manual_seed(31)
    model = Model(*shape, bias)
    weight = model.proj.weight.detach().clone()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["proj"], **options)
    return inject_adapter_in_model(config, model).proj, weight


def store(prefix, **tensors):
    for name, tensor in tensors.items():
        found[f"{prefix}.{name}"] = tensor.detach().contiguous().clone()


for name, shape in [("wide", (24, 10)), ("tall", (10, 24))]:
    for rule in ["pissa", "olora"]:
        layer, weight = adapted(shape, init_lora_weights=rule)
        store(
            f"{rule}.{name}",
            weight=weight,
            residual=layer.base_layer.weight,
            lora_A=layer.lora_A["default"].weight,
            lora_B=layer.lora_B["default"].weight,
        )

    generator = torch.Generator().manual_seed(32)
    random = lambda *sizes: torch.rand(sizes, generator=generator) * 2 - 1
    x, dy = random(3, shape[0]), random(3, shape[1])

    # PEFT runs this variant on GPTQ layers only; its forward function is the same for any.
    layer, weight = adapted(shape)
    group = 2
    layer.lora_A["default"] = torch.nn.Linear(shape[0] // group, RANK, bias=False)
    layer.qalora_group_size = {"default": group}
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data, b.data = random(*a.shape), random(*b.shape)
    inputs = x.clone().requires_grad_()
    y = QALoraLinearVariant.forward(layer, "default", inputs, layer.base_layer(inputs))
    grads = torch.autograd.grad((y * dy).sum(), [a, b, inputs])
    store(f"qalora.{name}", weight=weight, lora_A=a, lora_B=b, x=x, dy=dy, y=y)
    store(f"qalora.{name}", grad_A=grads[0], grad_B=grads[1], grad_x=grads[2])

    layer, weight = adapted(shape, bias=True, use_dora=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m = layer.lora_magnitude_vector["default"].weight
    store(f"dora.{name}", first_magnitude=m)
    b.data, m.data = random(*b.shape), m.data + 0.1 * random(*m.shape)
    inputs = x.clone().requires_grad_()
    y = layer(inputs)
    grads = torch.autograd.grad((y * dy).sum(), [a, b, m, inputs])
    store(f"dora.{name}", weight=weight, bias=layer.base_layer.bias, lora_A=a, lora_B=b, magnitude=m)
    store(f"dora.{name}", x=x, dy=dy, y=y)
    store(f"dora.{name}", grad_A=grads[0], grad_B=grads[1], grad_magnitude=grads[2], grad_x=grads[3])
    layer.merge()
    store(f"dora.{name}", merged=layer.base_layer.weight)

save_file(found, sys.argv[1])
