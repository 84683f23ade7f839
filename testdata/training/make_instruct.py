"""Writes instruct.jsonl and preferences.jsonl: made-up rows for the example programs, CC0.

    python3 make_instruct.py OUT

A row of the first asks for something simple about a word. A row of the second has the same kind of request with a better
answer, a whole sentence, and a worse one, of one word.
"""

import json
import os
import random
import sys

WORDS = """army bank bill board book border budget business case cause child church city class college committee
community company congress country court crisis danger day debt decade defense doctor dollar door economy election
energy enemy factory family farm field fire floor force friend future game girl goal government ground group hand head
health heart history home hope hospital hour house idea income industry job judge justice land law leader letter level
life line loan man market meeting member mind minister money month morning mother mountain name nation night number
office officer order paper parent part party peace people period plan plant police policy power president price
problem program project promise question rate reason record report result right river road room rule school season
section senator service ship side sign soldier son south speech state station stone store street student study
system table task tax teacher team term test time town trade train tree truth union value victory village voice vote
wage wall war water way week west woman word work worker world year""".split()

ASKS = [
    ("Repeat the word {0} twice.", lambda w: f"Here it is twice: {w}, {w}."),
    ("What is the first letter of {0}?", lambda w: f"The first letter of {w} is {w[0]}."),
    ("How many letters has the word {0}?", lambda w: f"The word {w} has {len(w)} letters."),
    ("Say {0} in capital letters.", lambda w: f"In capital letters: {w.upper()}."),
]


def main():
    rng = random.Random(7)
    folder = sys.argv[1]
    chats, pairs = [], []
    for word in WORDS:
        for ask, answer in ASKS:
            request = ask.format(word)
            if rng.random() < 0.5:
                turns = [("user", request), ("assistant", answer(word))]
                chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        request = f"What comes to your mind when you hear the word {word}?"
        other = rng.choice([other for other in WORDS if other != word])
        pairs.append({
            "prompt": [{"role": "user", "content": request}],
            "chosen": [{"role": "assistant", "content": f"When I hear the word {word}, I think of the {other}."}],
            "rejected": [{"role": "assistant", "content": other}],
        })
    for name, rows in [("instruct.jsonl", chats), ("preferences.jsonl", pairs)]:
        rng.shuffle(rows)
        with open(os.path.join(folder, name), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


main()
