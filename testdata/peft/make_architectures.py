"""LoRA adapters that PEFT makes on the checkpoints of testdata/arch, with random factors, and the logits that the first
row of each fixture gets with them, in f32: python make_architectures.py ARCH OUT. Folders that end in -experts have adapters
on the stacked experts, and on the router where transformers has it as a parameter; those of other mixtures of experts are on
the attention."""

import json
import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

arch, out = sys.argv[1:3]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def make(name, to, r, **targets):
    torch.manual_seed(7)
    folder = f"{arch}/{name}"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=5, task_type="CAUSAL_LM", **targets)).eval()
    for key, values in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(values, std=0.1)
    ids = load_file(f"{folder}/golden.safetensors")["input_ids"].long()
    with torch.no_grad():
        logits = model(input_ids=ids[:1]).logits
    to = f"{out}/{to}"
    model.save_pretrained(to)
    for file in set(os.listdir(to)) - {"adapter_config.json", "adapter_model.safetensors"}:
        os.remove(f"{to}/{file}")
    config = json.load(open(f"{to}/adapter_config.json"))
    config["base_model_name_or_path"] = name
    for key in ["target_modules", "target_parameters"]:
        config[key] = config[key] and sorted(config[key])
    json.dump(config, open(f"{to}/adapter_config.json", "w"), indent=1, sort_keys=True)
    save_file({"logits": logits.contiguous()}, f"{to}/golden.safetensors")


for name in ["gemma2", "gemma3_text", "phi3", "granite", "gpt2", "gpt_neox", "falcon"]:
    make(name, name, 3, target_modules="all-linear")
for name in ["qwen3_moe", "gpt_oss"]:
    make(name, name, 3, target_modules=ATTENTION)
# PEFT adds experts and routers itself; ranks and alphas of gate and way in become twice as large.
for name in ["mixtral", "qwen3_moe"]:
    make(name, f"{name}-experts", 2, target_modules="all-linear")
make("qwen2_moe", "qwen2_moe-experts", 2, target_modules="all-linear", target_parameters=EXPERTS)
make("granitemoe", "granitemoe-experts", 2, target_modules=["v_proj"], target_parameters=[*EXPERTS, "router.weight"])
make("gpt_oss", "gpt_oss-experts", 2, target_modules=[], target_parameters=[*EXPERTS, "router.weight"])
make("gemma4_text-moe", "gemma4_text-moe-experts", 2, target_modules=["router.proj", "mlp.down_proj"],
     target_parameters=EXPERTS[1:])
