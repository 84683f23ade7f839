#!/usr/bin/env python3
"""Runs lm-evaluation-harness on Kiln's task descriptions, and compares each document with Kiln's log of samples.

    pip install torch==2.15.0 transformers==5.23.0 lm-eval==0.4.13 gguf==0.19.0
    cargo run --release -p kiln-examples --example 09-evaluate -- --tasks FILE.json --shots 2 --samples samples.jsonl
    python3 scripts/compare-lm-eval.py --model FOLDER --samples samples.jsonl --shots 2 --tasks FILE.json

The model is a transformers folder, or a .gguf file; it runs in f32 on the CPU, batch 1, with eager attention. Tasks are
Kiln's description files (JSON, which is YAML to the harness) that name their own data files; or, with --data FOLDER, names
of the harness, which then takes its own descriptions and the rows in FOLDER/<task>/<split>.jsonl. For each task it prints the
largest difference of a log-likelihood and how many documents differ in a request, an answer or a score. Fails if a
log-likelihood differs by more than --tolerance, or anything else at all. --reference FILE writes what the harness found
in the compact form of testdata/eval/lm_eval_reference.json, for the tests. Needs no network.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time

# Before the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CACHE = tempfile.mkdtemp()
os.environ["HF_DATASETS_CACHE"] = CACHE

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a folder, or a .gguf file")
    parser.add_argument("--tasks", type=pathlib.Path, nargs="+", required=True,
                        help="description files of one folder; with --data, names of the harness")
    parser.add_argument("--data", type=pathlib.Path, help="rows for the harness's own descriptions")
    parser.add_argument("--shots", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--samples", type=pathlib.Path, help="Kiln's log")
    parser.add_argument("--reference", type=pathlib.Path, help="where to write what the harness found")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of a log-likelihood (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: %(default)s)")
    return parser.parse_args()


def load(path):
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
    folder = str(path)
    if path.suffix == ".gguf":
        folder, kwargs["gguf_file"] = str(path.parent), path.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **gguf)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", softmax_dtype="float32")


def own_description(name, data, folder):
    """Copies the harness's description of a task, and what lies beside it, to a folder; its rows come from `data`."""
    for file in pathlib.Path(lm_eval.__file__).parent.glob("tasks/**/*.yaml"):
        text = file.read_text()
        if re.search(rf"^task: {name}$", text, re.MULTILINE):
            break
    else:
        sys.exit(f"{name}: lm-eval has no such task")
    shutil.copytree(file.parent, folder / name, ignore=shutil.ignore_patterns("*.yaml", "*.md", "__pycache__"))
    if included := re.search(r"^include: (.*)$", text, re.MULTILINE):
        text = (file.parent / included[1]).read_text() + text.replace(included[0], "")
    # Of keys that are there twice, the later one counts.
    keys = {match[1]: match[0] for match in re.finditer(r"^(\w+):.*\n(?:(?:[ -]|\n).*\n?)*", text + "\n", re.MULTILINE)}
    for key in ("dataset_path", "dataset_name", "tag", "group"):
        keys.pop(key, None)
    files = {file.stem: str(file) for file in sorted((data / name).glob("*.jsonl"))}
    splits = {key: value.split()[1] for key, value in keys.items() if key.endswith("_split")}
    for key, split in splits.items():
        if split not in files and split != "null":
            del keys[key]
    keys["dataset_path"] = "dataset_path: json\n"
    keys["dataset_kwargs"] = f"dataset_kwargs: {json.dumps({'data_files': files})}\n"
    (folder / name / f"{name}.yaml").write_text("\n".join(keys.values()))


def run(lm, tasks, data, shots, limit, resamples):
    """The harness's results and, by task, its samples by document and filter."""
    names = [name_of(task, data) for task in tasks]
    with tempfile.TemporaryDirectory() as folder:
        for task, name in zip(tasks, names):
            if data:
                own_description(name, data, pathlib.Path(folder))
            else:
                shutil.copy(task, pathlib.Path(folder) / f"{name}.yaml")
        manager = TaskManager(include_path=folder, include_defaults=False)
        start = time.monotonic()
        found = lm_eval.simple_evaluate(
            model=lm, tasks=names, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=True,
            bootstrap_iters=resamples, random_seed=0, numpy_random_seed=1234, torch_random_seed=1234,
            fewshot_random_seed=1234,
        )
    return found, time.monotonic() - start


def name_of(task, data):
    return str(task) if data else json.loads(task.read_text())["task"]


def is_rolling(task, data):
    return task.name == "wikitext" if data else "rolling" in json.loads(task.read_text())["output_type"]


def texts(sample):
    """All request texts of a document, in Kiln's order."""
    result = []
    for arguments in sample["arguments"]:
        # A rolling or generating request has one text.
        result += [text for text in arguments if isinstance(text, str)]
    return result


def answers(sample):
    return [response[0] for response in sample["resps"]]


def by_document(samples):
    documents = {}
    for sample in samples:
        entry = documents.setdefault(sample["doc_id"], {"sample": sample, "scores": {}})
        for metric in sample["metrics"]:
            score = sample[metric]
            entry["scores"][f"{metric},{sample['filter']}"] = (
                [float(part) for part in score] if isinstance(score, (list, tuple)) else float(score)
            )
    return [documents[index] for index in sorted(documents)]


def reference(task, shots, found, documents, lm):
    digest = hashlib.sha256()
    for document in documents:
        for text in texts(document["sample"]):
            digest.update(text.encode() + b"\0")
    flat = [answer for document in documents for answer in answers(document["sample"])]
    if isinstance(flat[0], str):
        compact = {"texts": flat}
    elif isinstance(flat[0], (list, tuple)):
        compact = {"ll": [round(float(answer[0]), 4) for answer in flat],
                   "greedy": "".join(str(int(answer[1])) for answer in flat)}
    else:
        compact = {"ll": [round(float(answer), 4) for answer in flat]}
    scores = {}
    for document in documents:
        for key, score in document["scores"].items():
            scores.setdefault(key, []).append(score)
    # Zeros and ones as text.
    scores = {key: "".join(str(int(score)) for score in list_) for key, list_ in scores.items()
              if all(score in (0.0, 1.0) for score in list_)}
    results = {key: [value, found["results"][task].get(f"{key.split(',')[0]}_stderr,{key.split(',')[1]}")]
               for key, value in found["results"][task].items()
               if "," in key and "_stderr" not in key}
    results = {key: [value, None if isinstance(error, str) else error] for key, (value, error) in results.items()}
    pairs = [(a[0], a[1]) for a in documents[0]["sample"]["arguments"] if len(a) == 2 and isinstance(a[1], str)]
    tokens = [list(lm._encode_pair(*pair)) for pair in pairs[:2]]
    return {"task": task, "shots": shots, "documents": len(documents), "requests": digest.hexdigest(),
            "tokens": tokens, **compact, "scores": scores, "results": results}


def kiln_texts(sample):
    requests = sample["requests"]
    if "text" in requests:
        return [requests["text"]]
    if "context" in requests:
        return [requests["context"]]
    contexts, continuations = requests["contexts"], requests["continuations"]
    count = max(len(contexts), len(continuations))
    return [text for i in range(count)
            for text in (contexts[i % len(contexts)], continuations[i % len(continuations)])]


def compare(task, documents, ours, tolerance):
    """Prints the differences of one task; whether there is none that counts."""
    largest, different = 0.0, {"requests": 0, "answers": 0, "scores": 0}
    for index, document in enumerate(documents):
        sample = ours.get(index)
        if sample is None:
            sys.exit(f"{task}: document {index} isn't in Kiln's log")
        different["requests"] += kiln_texts(sample) != texts(document["sample"])
        wrong = len(sample["responses"]) != len(answers(document["sample"]))
        for mine, theirs in zip(sample["responses"], answers(document["sample"])):
            if isinstance(theirs, str):
                wrong |= mine != theirs
                continue
            pair = isinstance(theirs, (list, tuple))
            value = abs((mine[0] if pair else mine) - float(theirs[0] if pair else theirs))
            # A NaN is neither small nor equal.
            wrong |= not value <= tolerance or (pair and bool(mine[1]) != bool(theirs[1]))
            largest = max(largest, value)
        different["answers"] += wrong
        for key, score in document["scores"].items():
            mine = sample["scores"][key]
            parts = zip(mine, score) if isinstance(score, list) else [(mine, score)]
            different["scores"] += any(not abs(a - b) <= tolerance for a, b in parts)
    counts = ", ".join(f"{count} in {what}" for what, count in different.items())
    print(f"{task}: {len(documents)} documents; largest difference of a log-likelihood {largest:.2e}; "
          f"documents or scores that differ: {counts}")
    return not any(different.values())


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    versions = {module.__name__: module.__version__ for module in (torch, transformers)} | {"lm_eval": "0.4.13"}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    logged = {}
    if options.samples:
        for line in options.samples.read_text().splitlines()[1:]:
            sample = json.loads(line)
            logged.setdefault((sample["task"], sample["shots"]), {})[sample["document"]] = sample
    data = options.data and options.data.resolve()
    tasks = options.tasks if data else [file.resolve() for file in options.tasks]
    model, reference_file = options.model.resolve(), options.reference and options.reference.resolve()
    if not data:
        # Descriptions name their data files from their own folder.
        os.chdir(tasks[0].parent)
    lm = load(model)
    runs, passed = [], True
    for shots in options.shots:
        mine = [task for task in tasks if shots == 0 or not is_rolling(task, data)]
        found, seconds = run(lm, mine, data, shots, options.limit, options.resamples)
        total = 0
        for task, samples in found["samples"].items():
            documents = by_document(samples)
            total += len(documents)
            runs.append(reference(task, shots, found, documents, lm))
            if options.samples:
                passed &= compare(task, documents, logged.get((task, shots), {}), options.tolerance)
        print(f"{shots} examples: {total} documents in {seconds:.1f} s, {total / seconds:.2f} documents a second")
    if reference_file:
        lines = ",\n".join(json.dumps(run, separators=(",", ":"), ensure_ascii=False) for run in runs)
        head = json.dumps({"versions": versions, "resamples": options.resamples})[:-1]
        reference_file.write_text(f"{head}, \"runs\": [\n{lines}\n]}}\n")
    shutil.rmtree(CACHE, ignore_errors=True)
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
