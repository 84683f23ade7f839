"""Makes words.json: how llama.cpp splits texts by the names in `tokenizer.ggml.pre`, seen in the ids of one vocabulary.

    pip install llama-cpp-python==0.3.36 gguf
    python make_words.py

Each name is written into a GGUF file with the tokens and merges of ../models/tiny-llama, whose ids of the texts are llama.cpp's.
"""

import json
import tempfile
from pathlib import Path

import gguf
import numpy
from llama_cpp import Llama

HERE = Path(__file__).parent
TOKENIZER = json.loads((HERE / "../models/tiny-llama/tokenizer.json").read_text("utf-8"))
NAMES = """gpt-2 smollm starcoder command-r llama-bpe smaug-bpe chatglm-bpe glm4 qwen2 stablelm2 qwen35 tekken gpt-4o seed-coder
deepseek-v3 hunyuan-dense bloom falcon""".split()
TEXTS = [
    "The harpooneers, it's THEY'LL don't I'M we'Ve he'd",
    "1 22 333 4444 55555 3.14 1,234,567 x12y 2024-11-28",
    "  two  spaces\tand\n\n lines \r\n\r\n  end",
    "naïve café — “quotes” … 日本語テキスト 漢字かな 🦀 \u00a0nbsp हिन्दी ไทย",
    "x=y+z; {\"a\": [1, 2]} // !!?\n#include <map> a/b $5 ~^|`",
    " leading and trailing  ",
    "camelCase HTTPServer ΑΒΓ Ünder ÜBER iPhone McDonald's O'NEILL'S",
    "cafe\u0301s A\u030a",
    "/path/to/file.txt\n\t- item (one), [two]; {three}.\n\n\nNext",
]


vocabulary, added = TOKENIZER["model"]["vocab"], {token["id"]: token for token in TOKENIZER["added_tokens"]}
tokens = {id: token for token, id in vocabulary.items()} | {id: token["content"] for id, token in added.items()}
tokens = [tokens[id] for id in range(len(tokens))]
merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in TOKENIZER["model"]["merges"]]
found = {}
for name in NAMES:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(16)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if id in added else 1 for id in range(len(tokens))])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_tensor("token_embd.weight", numpy.zeros((len(tokens), 8), numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model = Llama(path, vocab_only=True, verbose=False)
        found[name] = [model.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]
text = json.dumps({"texts": TEXTS, "ids": found}, ensure_ascii=False, separators=(",", ":"))
(HERE / "words.json").write_text(text, "utf-8")
