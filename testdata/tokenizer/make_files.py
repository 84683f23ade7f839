"""Small vocabularies in the files that tokenizers had before tokenizer.json, with ids by their own programs.

    python make_files.py TEXT FOLDER

Needs sentencepiece 0.2.3, tokenizers 0.23.3, transformers 5.24.0."""

import json
import sys
from pathlib import Path

import sentencepiece
from tokenizers import ByteLevelBPETokenizer

TEXT, OUT = Path(sys.argv[1]), Path(sys.argv[2])
TEXTS = [
    "The whale and the men went down to the sea.",
    "naïve café 日本語 🦀",
    "  two  spaces\tand\n\n lines \r\n",
    "it's THEY'LL don't 1 22 333 4444",
    "x=y+z; {\"a\": [1, 2]} // !!?",
    "",
    " ",
]
cases = {}

for name, kind, more in [
    ("llama", "bpe", {"byte_fallback": True, "remove_extra_whitespaces": False}),
    ("gemma", "bpe", {"byte_fallback": True, "remove_extra_whitespaces": False, "add_dummy_prefix": False, "user_defined_symbols": ["<turn>"]}),
    ("unigram", "unigram", {"byte_fallback": True, "remove_extra_whitespaces": False}),
    ("squeezed", "unigram", {}),
]:
    folder = OUT / f"spm-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(TEXT), model_prefix=str(folder / "tokenizer"), model_type=kind, vocab_size=420, character_coverage=0.999,
        normalization_rule_name="identity", hard_vocab_limit=False, num_threads=1, minloglevel=2, max_sentence_length=100000, **more)
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": name != "squeezed"}))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = TEXTS + (["a<turn>b"] if name == "gemma" else [])
    cases[f"spm-{name}"] = [{"text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))} for text in texts]

from transformers import GPT2Tokenizer, Qwen2Tokenizer

trained = ByteLevelBPETokenizer()
trained.train([str(TEXT)], vocab_size=500, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False)
for name, kind in [("gpt2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)]:
    folder = OUT / f"bpe-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind.__name__, "eos_token": "<|endoftext|>", "add_prefix_space": False}))
    tokenizer = kind(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    cases[f"bpe-{name}"] = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False), "decoded": tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))} for text in TEXTS + ["a<|endoftext|>b"]]

(OUT / "files.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1))
