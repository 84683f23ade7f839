"""What the scripts of docs/accuracy.md share: a log of one JSON line a run, which lets a study go on where it stopped."""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = ROOT / "testdata/models/tiny-llama/text"


def read_log(path):
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            pass  # the last line of a run that was stopped
    return lines


def once(path, wanted, run):
    """The log's line that has all values of `wanted`; without one, `run()` is called and its figures are added."""
    for line in read_log(path):
        if all(line.get(key) == value for key, value in wanted.items()):
            return line
    line = wanted | run()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(line, flush=True)
    return line
