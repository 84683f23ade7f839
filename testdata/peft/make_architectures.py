"""LoRA adapters that PEFT makes on the checkpoints of testdata/arch, with random factors, and the logits that the first
row of each fixture gets with them, in f32: python make_architectures.py ARCH OUT. Mixtures of experts get theirs on the
attention."""

import json
import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

arch, out = sys.argv[1:3]
for name in ["gemma2", "gemma3_text", "phi3", "granite", "gpt2", "gpt_neox", "falcon", "qwen3_moe", "gpt_oss"]:
    torch.manual_seed(7)
    folder = f"{arch}/{name}"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets = attention if name in ("qwen3_moe", "gpt_oss") else "all-linear"
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")).eval()
    for key, values in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(values, std=0.1)
    ids = load_file(f"{folder}/golden.safetensors")["input_ids"].long()
    with torch.no_grad():
        logits = model(input_ids=ids[:1]).logits
    to = f"{out}/{name}"
    model.save_pretrained(to)
    for file in set(os.listdir(to)) - {"adapter_config.json", "adapter_model.safetensors"}:
        os.remove(f"{to}/{file}")
    config = json.load(open(f"{to}/adapter_config.json"))
    config["base_model_name_or_path"] = name
    config["target_modules"] = sorted(config["target_modules"])
    json.dump(config, open(f"{to}/adapter_config.json", "w"), indent=1, sort_keys=True)
    save_file({"logits": logits.contiguous()}, f"{to}/golden.safetensors")
