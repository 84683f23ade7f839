"""Writes crates/models/src/gguf/iq_grids.bin: the vectors that GGUF's IQ types choose from, one signed byte a number.

    pip install gguf==0.19.0
    python scripts/make-iq-grids.py

In this order: IQ2_XXS (256 vectors of 8), IQ2_XS (512 of 8), IQ2_S (1024 of 8), IQ3_XXS (256 of 4), IQ3_S (512 of 4), and those of
IQ1_S and IQ1_M (2048 of 8).
"""

from pathlib import Path

import numpy
from gguf import quants

data = b""
for kind in (quants.IQ2_XXS, quants.IQ2_XS, quants.IQ2_S, quants.IQ3_XXS, quants.IQ3_S, quants.IQ1_S):
    kind.init_grid()
    data += kind.grid.astype(numpy.int8).tobytes()
(Path(__file__).parent / "../crates/models/src/gguf/iq_grids.bin").write_bytes(data)
