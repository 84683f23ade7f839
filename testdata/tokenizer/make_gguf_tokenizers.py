"""Makes gguf_tokenizers.json: small vocabularies in GGUF's terms, with ids by the original Python libraries.

    pip install tokenizers==0.23.3 sentencepiece==0.2.3
    python make_gguf_tokenizers.py

The byte-level ones are trained with `tokenizers` (Oniguruma regular expressions), the `llama` one with `sentencepiece`.
Text: ../models/tiny-llama/text/shift_train_moby.txt (Moby-Dick, public domain).
"""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
TEXT = (HERE / "../models/tiny-llama/text/shift_train_moby.txt").read_text("utf-8")[:60_000]
# Numbers and shouting, so that the ways of splitting them show in the ids.
TEXT += "".join(f"\n{n} {37 * n} I'LL DON'T don't" for n in range(3_000))

CASES = [
    "Call me Ishmael.",
    "",
    " ",
    "  two  spaces   here  ",
    "it's THEY'LL I'M don't 'tis",
    "1 22 333 4444 55555 3.14 1,234,567",
    "tabs\tand\nnewlines\r\n\r\n  indented\n\n\n",
    "naïve café, cafe\u0301 — “quotes” … ﬁ",
    "日本語とemoji 🦀👩‍🚀 \u200bzero\u00a0nbsp",
    "x=y+z; {\"a\": [1, 2]} // !!?\n#",
    "٣٤٥ ½ Ⅷ ²³",
    "the harpooneers Pequod\u2581whale ▁▁ _",
    "\x00\x07control",
    "<|end|>after and before<|end|>",
    "<tool>x",
    "the whale<tool>",
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern):
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def byte_level(pre, parts, ignore_merges=False, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    # A whole word that no merges lead to: found only where merges are ignored for whole words.
    for token in ["ĠPequod", "<|end|>", "<tool>"]:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokens = sorted(vocab, key=vocab.get)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "types": [{"<|end|>": 3, "<tool>": 4}.get(token, 1) for token in tokens],
        "merges": [" ".join(merge) for merge in merges],
        # With special tokens in the text.
        "cases": [case(tokenizer.encode(text).ids, text, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)) for text in CASES],
    }


def case(ids, text, decode):
    return {"text": text, "ids": ids, "decoded": decode(ids)}


def sentence_piece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=model, model_type="bpe", vocab_size=720,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"], control_symbols=["<|end|>"], minloglevel=2)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(processor.get_piece_size())
    kind = lambda i: (2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i)
                      else 4 if processor.id_to_piece(i) == "<tool>" else 1)
    # SentencePiece doesn't read control symbols in text, and puts no space after a symbol: such texts aren't compared.
    texts = [text for text in CASES if "<|end|>" not in text and not text.startswith("<tool>")]
    return {
        "model": "llama",
        "pre": None,
        "tokens": [processor.id_to_piece(i) for i in pieces],
        "types": [kind(i) for i in pieces],
        "scores": [processor.get_score(i) for i in pieces],
        "cases": [case(processor.encode(text), text, processor.decode) for text in texts],
    }


if __name__ == "__main__":
    bytes_with_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizers = [
        byte_level("gpt-2", [bytes_with_words]),
        byte_level("smollm", [pre_tokenizers.Digits(individual_digits=True), bytes_with_words]),
        byte_level("llama-bpe", split(LLAMA3), ignore_merges=True),
        byte_level("qwen2", split(QWEN2), normalizer=normalizers.NFC()),
        sentence_piece(),
    ]
    text = json.dumps(tokenizers, ensure_ascii=True)
    (HERE / "gguf_tokenizers.json").write_text(text + "\n")
