"""Makes one small LLaMA in the layouts of other programs, and what each stands for (`expected.safetensors`).

    python make_forms.py FOLDER

Needs torch 2.15, transformers 5.24.0, safetensors, compressed-tensors 0.20.0, bitsandbytes 0.50.2, hqq 0.2.8."""

import json
import sys
from pathlib import Path

import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(sys.argv[1])
torch.manual_seed(18)
CONFIG = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
MODEL = LlamaForCausalLM(CONFIG).float()
STATE = {name: value.detach().clone() for name, value in MODEL.state_dict().items() if name != "lm_head.weight"}
LINEARS = [name for name in STATE if "proj" in name]


def folder(name, tensors, expected, quantization=None, file="model.safetensors"):
    path = OUT / name
    path.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    if quantization:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config, indent=1, default=str))
    if file.endswith(".bin"):
        torch.save(tensors, path / file)
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path / file, metadata={"format": "pt"})
    save_file({name: value.float().contiguous() for name, value in expected.items()}, path / "expected.safetensors.reference")


def others():
    return {name: value.half() for name, value in STATE.items() if name not in LINEARS}


# torch.save of a state dict, one matrix a view of another's transpose, as tied or sliced weights are.
state = {name: value.half() for name, value in STATE.items()}
state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].t().contiguous().t()
folder("pytorch", state, {name: state[name] for name in STATE}, file="pytorch_model.bin")

# bitsandbytes' LLM.int8(): as Linear8bitLt saves it.
tensors, expected = others(), {}
for name in LINEARS:
    codes, scales, _ = int8_vectorwise_quant(STATE[name].half())
    tensors[name], tensors[name.replace(".weight", ".SCB")] = codes, scales
    tensors[name.replace(".weight", ".weight_format")] = torch.tensor(0, dtype=torch.uint8)
    expected[name] = int8_vectorwise_dequant(codes, scales)
folder("bnb-int8", tensors, expected, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "_load_in_8bit": True, "_load_in_4bit": False, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": ["lm_head"], "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False})

# compressed-tensors, pack-quantized.
for label, bits, group, symmetric in [("w4-group", 4, 32, True), ("w4-asymmetric", 4, 32, False), ("w3-channel", 3, None, True), ("w8-channel", 8, None, True)]:
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group" if group else "channel", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors, expected = others(), {}
    for name in LINEARS:
        weight = STATE[name]
        grouped = weight.reshape(weight.shape[0], -1, group or weight.shape[1])
        scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), args)
        scale = scale.float()
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        tensors.update({name.replace("weight", part): value for part, value in packed.items()})
        expected[name] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": args.strategy, "group_size": group, "actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {}}
    folder(f"compressed-{label}", tensors, expected, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}}, "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed", "global_compression_ratio": None})

# 8-bit floats: torch's own rounding to E4M3; a scale for each block of 24 x 24 (transformers' fine-grained FP8), and one for
# each output (compressed-tensors' float-quantized).
tensors, expected = others(), {}
for name in LINEARS:
    rows, columns = STATE[name].shape
    blocks = [[STATE[name][r : r + 24, c : c + 24] for c in range(0, columns, 24)] for r in range(0, rows, 24)]
    scales = torch.tensor([[block.abs().max() / 448 for block in line] for line in blocks])
    spread = scales.repeat_interleave(24, 0)[:rows].repeat_interleave(24, 1)[:, :columns]
    codes = (STATE[name] / spread).to(torch.float8_e4m3fn)
    tensors[name], tensors[name + "_scale_inv"] = codes, scales
    expected[name] = codes.float() * spread
folder("fp8-blocks", tensors, expected, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 24]})
tensors, expected = others(), {}
for name in LINEARS:
    scales = STATE[name].abs().amax(1, keepdim=True) / 448
    codes = (STATE[name] / scales).to(torch.float8_e4m3fn)
    tensors[name], tensors[name + "_scale"] = codes, scales
    expected[name] = codes.float() * scales
weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
folder("fp8-outputs", tensors, expected, {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}}}, "ignore": ["lm_head"], "quantization_status": "compressed"})

# From the model without a head: no prefix.
folder("no-prefix", {name.removeprefix("model."): value.half() for name, value in STATE.items()}, {name: value.half() for name, value in STATE.items()})

# HQQ: as HQQLinear's state dict has it, a way of packing for each linear; axis 0 and groups over two outputs can't stay packed.
SETTINGS = {"q_proj": (4, 16, 1), "k_proj": (8, 32, 1), "v_proj": (2, 16, 1), "o_proj": (3, 16, 1), "gate_proj": (4, 64, 1), "up_proj": (4, 16, 0), "down_proj": (1, 32, 1)}
HQQLinear.set_backend(HQQBackend.PYTORCH)
tensors, expected = others(), {}
for name in LINEARS:
    bits, group, axis = SETTINGS[name.split(".")[-2]]
    linear = torch.nn.Linear(*reversed(STATE[name].shape), bias=False)
    linear.weight.data = STATE[name].clone()
    linear = HQQLinear(linear, BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis), compute_dtype=torch.float32, device="cpu")
    module = name.removesuffix(".weight")
    tensors |= {f"{module}.{part}": value for part, value in linear.state_dict().items() if torch.is_tensor(value)}
    expected[name] = linear.dequantize()
settings = {"weight_quant_params": {"nbits": 4, "channel_wise": True, "group_size": 16, "optimize": True, "round_zero": True, "axis": 1, "view_as_float": False}, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
folder("hqq", tensors, expected, {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]})
