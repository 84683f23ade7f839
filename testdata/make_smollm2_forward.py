"""Makes smollm2_forward_f32.safetensors smaller: drops `pK.logits_last`, whose every 64th value, 32 largest and
logarithm of the sum of exponentials stay. Usage: make_smollm2_forward.py IN OUT"""

import json
import struct
import sys

with open(sys.argv[1], "rb") as file:
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    data = file.read()

kept, chunks, offset = {"__metadata__": header.pop("__metadata__")}, [], 0
for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
    if name.endswith(".logits_last"):
        continue
    begin, end = entry["data_offsets"]
    chunks.append(data[begin:end])
    kept[name] = entry | {"data_offsets": [offset, offset + end - begin]}
    offset += end - begin
text = json.dumps(kept).encode()
text += b" " * (-len(text) % 8)
with open(sys.argv[2], "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + b"".join(chunks))
