"""Adapter folders of PEFT that train embedding and head, on two checkpoints of testdata/arch, one tied (gemma2) and one not
(granite): python make_tables.py ARCH OUT. With each: logits of the fixture's first row (and of a text with the added tokens),
the mean loss of its next tokens and the gradients of all that is trained, in f32."""

import json
import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

arch, out = sys.argv[1:3]
VOCABULARY, ADDED = 96, 2
kinds = {
    # Whole copies of both, and of a norm.
    "saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]),
    # Of the embedding only: a head that was the embedding keeps the old one.
    "embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    # Of the embedding, which stays the head.
    "tying": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "lora": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "rows": dict(target_modules=["q_proj"], trainable_token_indices=[3, 17, 90, VOCABULARY, VOCABULARY + 1]),
    "added": dict(target_modules=["q_proj"]),
}
for base in ["gemma2", "granite"]:
    for kind, options in kinds.items():
        if kind == "tying" and base != "gemma2":
            continue
        torch.manual_seed(7)
        folder = f"{arch}/{base}"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ids = load_file(f"{folder}/golden.safetensors")["input_ids"].long()[:1]
        if kind in ("rows", "added"):
            model.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
            for table in [model.get_input_embeddings(), model.get_output_embeddings()]:
                # As Kiln adds rows: the mean of the others.
                table.weight.data[VOCABULARY:] = table.weight.data[:VOCABULARY].mean(0)
            ids[0, 2], ids[0, 5] = VOCABULARY + 1, VOCABULARY
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)).eval()
        for key, values in model.named_parameters():
            if "lora_B" in key or "lora_embedding_A" in key:
                torch.nn.init.normal_(values, std=0.1)
            elif values.requires_grad and "lora_" not in key:
                values.data += 0.05 * torch.randn_like(values)
        ids[0, 1] = 17
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        loss.backward()
        found = {"input_ids": ids.int(), "logits": logits.detach().contiguous(), "loss": loss.detach().reshape(1)}
        for key, values in model.named_parameters():
            if values.requires_grad and values.grad is not None:
                found[f"grad.{key}"] = values.grad.contiguous()
        to = f"{out}/{base}-{kind}"
        model.save_pretrained(to)
        for file in set(os.listdir(to)) - {"adapter_config.json", "adapter_model.safetensors"}:
            os.remove(f"{to}/{file}")
        config = json.load(open(f"{to}/adapter_config.json"))
        config["base_model_name_or_path"] = base
        for key in ["target_modules", "modules_to_save"]:
            config[key] = config[key] and sorted(config[key])
        json.dump(config, open(f"{to}/adapter_config.json", "w"), indent=1, sort_keys=True)
        save_file(found, f"{to}/golden.safetensors")
        print(base, kind, {k: list(v.shape) for k, v in load_file(f"{to}/adapter_model.safetensors").items() if "q_proj" not in k},
              [k for k in found if k.startswith("grad") and "q_proj" not in k], {k: config[k] for k in ["modules_to_save", "trainable_token_indices", "ensure_weight_tying"]})
