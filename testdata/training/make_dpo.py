#!/usr/bin/env python3
"""Makes `dpo_10steps.json` and `dpo_10steps.safetensors`: ten steps of TRL's DPOTrainer with LoRA, on the CPU in f32.

    pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2 trl==1.16.0 datasets safetensors
    OMP_NUM_THREADS=1 python3 make_dpo.py TESTDATA OUT

Base: `tiny/llama-tied-f32-sharded` with a new LoRA (r 8, alpha 16, all seven linears), since DPOTrainer would take a copy
of a trained adapter as the reference; with a new one it takes the base. The .safetensors holds the adapter before the
first step under the names of PEFT's adapter files, B zero. A loop in plain torch, without TRL and padding, runs the same
steps; both are in the JSON, losses before each step's update.
"""

import json
import sys
import tempfile

import peft
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

STEPS, PAIRS, BATCH, BETA, RATE = 10, 6, 2, 0.1, 1e-3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
testdata, out = sys.argv[1:3]


def load():
    path = f"{testdata}/tiny/llama-tied-f32-sharded"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def lora():
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")


def tokenizer():
    """Token i is the word "ti"."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, 256)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


generator = torch.Generator().manual_seed(78)


def text(count):
    return " ".join(f"t{i}" for i in torch.randint(3, 256, (count,), generator=generator).tolist())


rows = [
    {"prompt": text(4 + i), "chosen": " " + text(5 + i % 3), "rejected": " " + text(7 - i % 4)} for i in range(PAIRS)
]
steps = []


class Recorder(DPOTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]
        sequences = []
        for ids, real, scored in zip(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]):
            start, end = int(scored.argmax()), int(real.sum())
            sequences.append((ids[:start].tolist(), ids[start:end].tolist()))
        half = len(sequences) // 2
        pairs = [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for (prompt, chosen), (_, rejected) in zip(sequences[:half], sequences[half:])
        ]
        metrics = {name: self._metrics["train"][name][-1] for name in names}
        steps.append({"pairs": pairs, "trl": {"loss": loss.item(), **metrics}})
        return loss


with tempfile.TemporaryDirectory() as folder:
    config = DPOConfig(
        folder,
        beta=BETA,
        loss_type="sigmoid",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=79,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Recorder(
        load(), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), peft_config=lora()
    )
    start = {name: value.clone() for name, value in get_peft_model_state_dict(trainer.model).items()}
    trainer.train()

model = get_peft_model(load(), lora())
set_peft_model_state_dict(model, start)
optimizer = torch.optim.AdamW(
    [value for value in model.parameters() if value.requires_grad], lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
)


def logp(prompt, completion):
    tokens = torch.tensor([prompt + completion])
    per_token = model(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])
    return per_token[len(prompt) - 1 :].sum()


for step in steps:
    policy, reference = {}, {}
    for side in ["chosen", "rejected"]:
        sequences = [(pair["prompt"], pair[side]) for pair in step["pairs"]]
        policy[side] = torch.stack([logp(*sequence) for sequence in sequences])
        with torch.no_grad(), model.disable_adapter():
            reference[side] = torch.stack([logp(*sequence) for sequence in sequences])
    ratios = {side: policy[side] - reference[side] for side in policy}
    loss = -F.logsigmoid(BETA * (ratios["chosen"] - ratios["rejected"])).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rewards = {side: BETA * ratio.mean().item() for side, ratio in ratios.items()}
    step["plain"] = {
        "loss": loss.item(),
        "rewards/chosen": rewards["chosen"],
        "rewards/rejected": rewards["rejected"],
        "rewards/margins": rewards["chosen"] - rewards["rejected"],
        "logps/chosen": policy["chosen"].mean().item(),
        "logps/rejected": policy["rejected"].mean().item(),
        "policy": {side: value.tolist() for side, value in policy.items()},
        "reference": {side: value.tolist() for side, value in reference.items()},
    }
    assert abs(step["trl"]["loss"] - step["plain"]["loss"]) < 1e-5, step

found = {
    "versions": {
        "trl": trl.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    },
    "lora": {"r": 8, "alpha": 16, "target_modules": LINEARS},
    "training": {"beta": BETA, "lr": RATE, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "clip": None},
    "final_norms": {name: value.double().norm().item() for name, value in get_peft_model_state_dict(trainer.model).items()},
    "steps": steps,
}
with open(f"{out}/dpo_10steps.json", "w") as file:
    json.dump(found, file, indent=1)
save_file(start, f"{out}/dpo_10steps.safetensors")
