"""Writes letters_train.jsonl, letters_test.jsonl and letters.json: a made-up task for the example programs, CC0.

    python3 make_letters.py OUT

A question asks for the first or the last letter of a word, of which the test has others than the training part.
"""

import json
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "training"))
source = open(os.path.join(sys.path[0], "make_instruct.py")).read()
WORDS = source.split('WORDS = """')[1].split('"""')[0].split()

TASK = {
    "task": "letters",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "letters_train.jsonl", "test": "letters_test.jsonl"}},
    "output_type": "multiple_choice",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}],
    "metadata": {"version": 1.0},
}


def main():
    rng = random.Random(11)
    rows = {"train": [], "test": []}
    words = WORDS[:]
    rng.shuffle(words)
    letters = "abcdefghilmnoprstwy"
    for index, word in enumerate(words):
        part = "test" if index % 4 == 0 else "train"
        for place, letter in [("first", word[0]), ("last", word[-1])]:
            others = rng.sample([other for other in letters if other != letter and other not in (word[0], word[-1])], 2)
            # The word's other end is the trap.
            trap = word[-1] if place == "first" else word[0]
            choices = others + [letter] + ([trap] if trap != letter else rng.sample([o for o in letters if o != letter and o not in others], 1))
            rng.shuffle(choices)
            rows[part].append({"question": f"What is the {place} letter of {word}?", "choices": choices, "answer": choices.index(letter)})
    for part in rows:
        rng.shuffle(rows[part])
        with open(os.path.join(sys.argv[1], f"letters_{part}.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[part])
    with open(os.path.join(sys.argv[1], "letters.json"), "w") as file:
        json.dump(TASK, file, indent=2)
        file.write("\n")


main()
