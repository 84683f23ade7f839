"""Makes a safetensors file smaller: drops the tensors whose whole name matches a pattern.
Usage: drop_tensors.py IN OUT PATTERN"""

import json
import re
import struct
import sys

with open(sys.argv[1], "rb") as file:
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    data = file.read()

kept, chunks, offset = {}, [], 0
if "__metadata__" in header:
    kept["__metadata__"] = header.pop("__metadata__")
for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
    if re.fullmatch(sys.argv[3], name):
        continue
    begin, end = entry["data_offsets"]
    chunks.append(data[begin:end])
    kept[name] = entry | {"data_offsets": [offset, offset + end - begin]}
    offset += end - begin
text = json.dumps(kept).encode()
text += b" " * (-len(text) % 8)
with open(sys.argv[2], "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + b"".join(chunks))
