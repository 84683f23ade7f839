"""What scripts/gpu-check.sh is compared with: torch's bf16 products and PEFT's bf16 LoRA step of Llama 3.2 1B's shape,
random weights, rank 16 on all linears, AdamW, clipping; sdpa attention. Needs torch, transformers and peft."""

import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

DEVICE = "cuda"


def seconds(function, runs):
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs


def products():
    for name, left, right, transposed in [
        ("4096x2048x8192", (4096, 2048), (2048, 8192), False),
        ("4096x8192x2048, transposed", (4096, 8192), (2048, 8192), True),
        ("4096x2048x2048", (4096, 2048), (2048, 2048), False),
        ("4096 cubed", (4096, 4096), (4096, 4096), False),
        ("2048x2048x128256", (2048, 2048), (128256, 2048), True),
    ]:
        a = torch.randn(left, device=DEVICE, dtype=torch.bfloat16)
        b = torch.randn(right, device=DEVICE, dtype=torch.bfloat16)
        b = b.transpose(-1, -2) if transposed else b
        took = seconds(lambda: a @ b, 10)
        print(f"torch bf16 {name:28} {took * 1e6:9.1f} us {2 * a.numel() * b.shape[-1] / took / 1e12:7.1f} TFLOP/s")


def steps():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        for shape in ((1, 512), (2, 2048)):
            ids = torch.randint(0, 128256, shape, device=DEVICE)
            torch.cuda.reset_peak_memory_stats()

            def step():
                model(input_ids=ids, labels=ids).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            took = seconds(step, 5)
            peak = torch.cuda.max_memory_allocated() / 1e9
            print(
                f"PEFT bf16 LoRA {shape[0]}x{shape[1]}, checkpointing {checkpointing}: {took * 1e3:.1f} ms, "
                f"{ids.numel() / took:.0f} tokens/s, peak {peak:.2f} GB",
                flush=True,
            )


print(torch.__version__, torch.cuda.get_device_name())
products()
steps()
