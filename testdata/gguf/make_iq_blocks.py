"""Makes iq_blocks_1x256.safetensors: a block of random bytes of each GGUF type that is read to dense, and its values.

    pip install gguf==0.19.0 safetensors numpy
    python make_iq_blocks.py
"""

from pathlib import Path

import numpy
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.numpy import save_file

NAMES = "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M TQ1_0 TQ2_0".split()
SCALE = numpy.frombuffer(numpy.float16(0.0371).tobytes(), numpy.uint8)
rng, tensors = numpy.random.default_rng(7), {}
for name in NAMES:
    kind = GGMLQuantizationType[name]
    block = rng.integers(0, 256, GGML_QUANT_SIZES[kind][1], dtype=numpy.uint8)
    if name == "IQ1_M":
        # Its scale lies in the highest four bits of four numbers.
        nibbles = int.from_bytes(SCALE.tobytes(), "little")
        for number in range(4):
            at = 49 + 2 * number
            block[at] = block[at] & 15 | (nibbles >> 4 * number & 15) << 4
    else:
        at = -2 if name.startswith("TQ") else 0
        block[at : at + 2 or None] = SCALE
    values = quants.dequantize(block[None], kind)
    assert numpy.isfinite(values).all() and values.shape == (1, 256)
    tensors |= {f"{name}.bytes": block, f"{name}.values": values.astype(numpy.float32)}
save_file(tensors, Path(__file__).parent / "iq_blocks_1x256.safetensors")
