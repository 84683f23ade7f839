"""PEFT's adapters on transformers' models for sequence classification, on a checkpoint of testdata/arch, with three labels and
with one: python make_classifiers.py ARCH OUT. With each: scores of three rows of different lengths, loss, and the gradients of
all that is trained, in f32."""

import json
import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

arch, out = sys.argv[1:3]
base = "gemma2"
LENGTHS = [12, 7, 9]
for name, labels, values in [("classes", 3, [2, 0, 1]), ("number", 1, [0.5, -1.25, 3.0])]:
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(
        f"{arch}/{base}", dtype=torch.float32, attn_implementation="eager", num_labels=labels, pad_token_id=0)
    options = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = get_peft_model(model, options).eval()
    for key, weights in model.named_parameters():
        if "lora_B" in key or "score" in key:
            torch.nn.init.normal_(weights, std=0.1)
    ids = load_file(f"{arch}/{base}/golden.safetensors")["input_ids"].long().reshape(-1)[: 3 * 12].reshape(3, 12).clamp(min=1)
    mask = torch.tensor([[1] * length + [0] * (12 - length) for length in LENGTHS])
    ids = ids * mask
    result = model(input_ids=ids, attention_mask=mask, labels=torch.tensor(values))
    result.loss.backward()
    found = {"input_ids": ids.int(), "values": torch.tensor(values).float(), "lengths": torch.tensor(LENGTHS).int(),
             "scores": result.logits.detach().contiguous(), "loss": result.loss.detach().reshape(1)}
    for key, weights in model.named_parameters():
        if weights.requires_grad and weights.grad is not None:
            found[f"grad.{key}"] = weights.grad.contiguous()
    to = f"{out}/{name}"
    model.save_pretrained(to)
    for file in set(os.listdir(to)) - {"adapter_config.json", "adapter_model.safetensors"}:
        os.remove(f"{to}/{file}")
    config = json.load(open(f"{to}/adapter_config.json"))
    config["base_model_name_or_path"] = base
    for key in ["target_modules", "modules_to_save"]:
        config[key] = sorted(config[key])
    json.dump(config, open(f"{to}/adapter_config.json", "w"), indent=1, sort_keys=True)
    save_file(found, f"{to}/golden.safetensors")
    print(name, {k: list(v.shape) for k, v in load_file(f"{to}/adapter_model.safetensors").items()}, list(found), config["modules_to_save"])
