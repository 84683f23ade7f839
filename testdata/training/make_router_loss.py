"""Losses of transformers' mixtures of experts with their load-balancing loss: python make_router_loss.py ARCH OUT."""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

arch, out = sys.argv[1:]
golden = {}
for name in ["mixtral", "granitemoe"]:
    model = AutoModelForCausalLM.from_pretrained(f"{arch}/{name}", dtype=torch.float32, attn_implementation="eager")
    ids = load_file(f"{arch}/{name}/golden.safetensors")["input_ids"].long()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 6] = -100  # would be a padding token's target
    model.router_aux_loss_coef = 0.3
    result = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels, output_router_logits=True
    )
    result.loss.backward()
    golden |= {f"{name}.loss": result.loss.reshape(1), f"{name}.aux_loss": result.aux_loss.reshape(1)}
    golden |= {
        f"{name}.grad.{key}": values.grad
        for key, values in model.named_parameters()
        if "gate.weight" in key or "router" in key or "embed_tokens" in key or "q_proj" in key
    }
save_file({key: values.detach().contiguous() for key, values in golden.items()}, out)
