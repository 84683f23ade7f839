"""Further checkpoints of testdata/arch, in the form of the others: python make_arch.py OUT.

`mxfp4` is no model: random blocks and scales of gpt-oss's experts, and what transformers makes of them.
"""

import os
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, OPTConfig, PhiConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

out = sys.argv[1]
common = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)
granite = dict(
    layer_types=["attention", "attention"], num_local_experts=0, num_experts_per_tok=0, intermediate_size=48,
    shared_intermediate_size=48, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4,
    logits_scaling=2.5, tie_word_embeddings=True, mamba_n_heads=4,
)
configs = {
    "granitemoehybrid": GraniteMoeHybridConfig(**common, **granite, position_embedding_type="rope"),
    "granitemoehybrid-nope": GraniteMoeHybridConfig(**common, **granite, position_embedding_type=None),
    "phi-norms": PhiConfig(**common, intermediate_size=48, qk_layernorm=True, partial_rotary_factor=0.5),
    "opt-post": OPTConfig(
        vocab_size=96, hidden_size=32, word_embed_proj_dim=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=128, do_layer_norm_before=False, init_std=0.15, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, dropout=0.0,
    ),
}
for seed, (name, config) in enumerate(configs.items()):
    torch.manual_seed(100 + seed)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for key, values in model.named_parameters():
        if "norm" in key or "layer_norm" in key:
            values.data = (1 if key.endswith("weight") else 0) + 0.1 * torch.randn_like(values)
        elif key.endswith("bias"):
            values.data = 0.1 * torch.randn_like(values)
    folder = f"{out}/{name}"
    model.save_pretrained(folder)
    ids = torch.randint(0, 96, (2, 24))
    outputs = model(input_ids=ids, output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].reshape(-1, 96), ids[:, 1:].reshape(-1))
    loss.backward()
    golden = {"input_ids": ids.int(), "logits": outputs.logits, "loss": loss.reshape(1)}
    golden |= {f"hidden.{i}": state for i, state in enumerate(outputs.hidden_states)}
    golden |= {f"grad.{key}": values.grad for key, values in model.named_parameters()}
    text = ids[:1, :8]
    golden["greedy.prompt"] = text.int()
    with torch.no_grad():
        for _ in range(16):
            text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    golden["greedy.out"] = text.int()
    save_file({key: values.detach().contiguous() for key, values in golden.items()}, f"{folder}/golden.safetensors")

torch.manual_seed(200)
os.makedirs(f"{out}/mxfp4", exist_ok=True)
tensors = {}
for name, rows, inputs in [("gate_up_proj", 128, 32), ("down_proj", 32, 64)]:
    blocks = torch.randint(0, 256, (2, rows, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (2, rows, inputs // 32), dtype=torch.uint8)
    prefix = f"model.layers.0.mlp.experts.{name}"
    tensors |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales}
    # `[experts, d_input, d_output]`, as gpt-oss has its matrices in memory.
    tensors[f"expected.{name}"] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
save_file(tensors, f"{out}/mxfp4/golden.safetensors")
