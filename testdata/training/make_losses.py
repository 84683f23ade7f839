#!/usr/bin/env python3
"""Makes `losses.json` and `losses.safetensors`: preference and token losses, and their gradients, as TRL computes them.

    pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2 trl==1.16.0 datasets safetensors
    OMP_NUM_THREADS=1 python3 make_losses.py TESTDATA OUT

Policy: `tiny/llama-tied-f32-sharded` with the adapter `peft/tiny-lora-r8-all`; reference and teacher: the same without
the adapter; all in f32. TRL's own methods run on trainers made without their constructors. `loss_f64` is the loss
computed once more in plain Python from the f32 log-probabilities of each sequence alone, without padding.

losses.json: `pairs`, `logps`, `kto_mismatched` and, by name, `losses`. losses.safetensors: `NAME.PARAMETER`, the
gradients of the parameters in FULL.
"""

import json
import math
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import trl
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.utils import add_fused_lm_head

# With this seed KTO's KL estimate is positive.
SEED, PAIRS, PAD = 76, 4, 0
FULL = [
    f"base_model.model.model.layers.{name}.lora_{part}.default.weight"
    for name in ["0.self_attn.q_proj", "1.mlp.down_proj"]
    for part in "AB"
]
testdata, out = sys.argv[1:3]

model = AutoModelForCausalLM.from_pretrained(
    f"{testdata}/tiny/llama-tied-f32-sharded", dtype=torch.float32, attn_implementation="eager"
)
add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
model = PeftModel.from_pretrained(model, f"{testdata}/peft/tiny-lora-r8-all", is_trainable=True).eval()
parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

generator = torch.Generator().manual_seed(SEED)
ids = lambda count: torch.randint(3, 256, (count,), generator=generator).tolist()
pairs = [{"prompt": ids(5 + i), "chosen": ids(6 + 2 * i), "rejected": ids(9 - i)} for i in range(PAIRS)]

# --- sums of log-probabilities of the completions, one sequence at a time


def logps(prompt, completion):
    tokens = torch.tensor([prompt + completion])
    with torch.no_grad():
        per_token = model(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return per_token.sum().item(), per_token[len(prompt) - 1 :].sum().item()


def both(prompt, completion):
    """The policy's and the reference's sums over the completion, and the policy's over all predicted tokens."""
    whole, policy = logps(prompt, completion)
    with model.disable_adapter():
        return policy, logps(prompt, completion)[1], whole


sides = ["chosen", "rejected"]
values = {side: [both(pair["prompt"], pair[side]) for pair in pairs] for side in sides}
policy = {side: [value[0] for value in values[side]] for side in sides}
reference = {side: [value[1] for value in values[side]] for side in sides}
lengths = {side: [len(pair[side]) for pair in pairs] for side in sides}

losses, gradients = {}, {}


def add(name, loss, check, source, formula, **more):
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    grads = dict(zip(parameters, grads))
    assert abs(loss.item() - check) < 1e-5 * max(1, abs(check)), (name, loss.item(), check)
    losses[name] = {
        "loss": loss.item(),
        "loss_f64": check,
        **more,
        "formula": formula,
        "source": source,
        "grad_norms": {key: grad.double().norm().item() for key, grad in grads.items()},
    }
    for key in FULL:
        gradients[f"{name}.{key}"] = grads[key].contiguous()


# --- the formulas in float64

mean = lambda numbers: sum(numbers) / len(numbers)
softplus = lambda x: max(x, 0) + math.log1p(math.exp(-abs(x)))
nls = lambda x: softplus(-x)  # -log sigmoid
sigmoid = lambda x: 1 / (1 + math.exp(-x))
ratios = {side: [p - r for p, r in zip(policy[side], reference[side])] for side in sides}
averages = {side: [p / n for p, n in zip(policy[side], lengths[side])] for side in sides}
deltas = [c - r for c, r in zip(*ratios.values())]
average_deltas = [
    c / n - r / m for c, r, n, m in zip(*(ratios[side] for side in sides), *(lengths[side] for side in sides))
]

# --- DPO and its relatives

accelerator = SimpleNamespace(
    device=torch.device("cpu"),
    unwrap_model=lambda model: model,
    gather=lambda value: value,
    gather_for_metrics=lambda value: value,
)


def trainer(kind, **fields):
    """A trainer with the fields that its loss reads and nothing else."""
    made = kind.__new__(kind)
    common = {
        "model": model,
        "ref_model": None,
        "accelerator": accelerator,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, device="cpu"),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "precompute_ref_logps": False,
        "_total_train_tokens": 0,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    vars(made).update(common | fields)
    return made


batch = DataCollatorForPreference(pad_token_id=PAD)([{f"{k}_ids": v for k, v in pair.items()} for pair in pairs])


def dpo(loss_type, beta, label_smoothing=0.0):
    made = trainer(
        DPOTrainer,
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    return made._compute_loss(model, batch, return_outputs=False)


DPO = "trl/trainer/dpo_trainer.py DPOTrainer._compute_loss, loss_type "
DELTA = "d = (pi_c - ref_c) - (pi_r - ref_r) of the sums over the completion; "
add(
    "dpo",
    dpo("sigmoid", 0.1),
    mean([nls(0.1 * d) for d in deltas]),
    DPO + "sigmoid",
    DELTA + "-logsigmoid(beta d); label_smoothing isn't read by this type",
    beta=0.1,
)
add(
    "dpo_robust",
    dpo("robust", 0.1, 0.2),
    mean([(0.8 * nls(0.1 * d) - 0.2 * nls(-0.1 * d)) / 0.6 for d in deltas]),
    DPO + "robust",
    DELTA + "(-(1-e) logsigmoid(beta d) + e logsigmoid(-beta d)) / (1 - 2e)",
    beta=0.1,
    label_smoothing=0.2,
)
add(
    "ipo",
    dpo("ipo", 0.1),
    mean([(d - 5) ** 2 for d in average_deltas]),
    DPO + "ipo",
    "d = (pi_c - ref_c) / n_c - (pi_r - ref_r) / n_r, n completion tokens; (d - 1 / (2 beta))^2",
    beta=0.1,
)
add(
    "dpo_hinge",
    dpo("hinge", 0.1),
    mean([max(0, 1 - 0.1 * d) for d in deltas]),
    DPO + "hinge",
    DELTA + "relu(1 - beta d)",
    beta=0.1,
)

# --- SimPO, cDPO and ORPO, from logits

tokens, attention, completion = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
labels = tokens.masked_fill(completion == 0, -100)
logits = model(input_ids=tokens, attention_mask=attention).logits
sums = CPOTrainer.get_batch_logps(logits, labels)
average_logps = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
with torch.no_grad(), model.disable_adapter():
    teacher_logits = model(input_ids=tokens, attention_mask=attention).logits
reference_sums = CPOTrainer.get_batch_logps(teacher_logits, labels)

CPO = "trl/experimental/cpo/cpo_trainer.py CPOTrainer.cpo_loss, loss_type "
cpo = trainer(CPOTrainer, loss_type="sigmoid", beta=0.1, label_smoothing=0.2, alpha=0.0)
add(
    "dpo_smoothed",
    cpo.cpo_loss(*(sums - reference_sums).chunk(2))[0].mean(),
    mean([0.8 * nls(0.1 * d) + 0.2 * nls(-0.1 * d) for d in deltas]),
    CPO + "sigmoid, called with log-ratios to the reference: cDPO, which DPOTrainer no longer has",
    DELTA + "-(1-e) logsigmoid(beta d) - e logsigmoid(-beta d)",
    beta=0.1,
    label_smoothing=0.2,
)
cpo = trainer(CPOTrainer, loss_type="simpo", beta=2.0, simpo_gamma=1.0, label_smoothing=0.0, alpha=0.0)
add(
    "simpo",
    cpo.cpo_loss(*average_logps)[0].mean(),
    mean([nls(2.0 * (c - r - 1.0 / 2.0)) for c, r in zip(*averages.values())]),
    CPO + "simpo",
    "-logsigmoid(beta (pi_c / n_c - pi_r / n_r - gamma / beta)), n completion tokens",
    beta=2.0,
    gamma=1.0,
)

orpo = trainer(ORPOTrainer, beta=0.1, padding_value=PAD)
orpo_batch = {
    f"{side}_{key}": half
    for key, value in {"input_ids": tokens, "attention_mask": attention, "labels": labels}.items()
    for side, half in zip(sides, value.chunk(2))
}
total, metrics = orpo.get_batch_loss_metrics(model, orpo_batch)
log_odds = [
    (c - r) - (math.log1p(-math.exp(c)) - math.log1p(-math.exp(r))) for c, r in zip(*averages.values())
]
ratio = 0.1 * mean([nls(x) for x in log_odds])
predicted = sum(len(pair["prompt"]) + len(pair["chosen"]) - 1 for pair in pairs)
nll = -sum(value[2] for value in values["chosen"]) / predicted
completion_nll = -sum(policy["chosen"]) / sum(lengths["chosen"])
chosen_logits, chosen_labels = logits[:PAIRS, :-1].flatten(0, 1), labels[:PAIRS, 1:].flatten()
cross_entropy = F.cross_entropy(chosen_logits, chosen_labels)
ratio_part = -orpo.odds_ratio_loss(*average_logps)[0].mean()
ORPO = "trl/experimental/orpo/orpo_trainer.py ORPOTrainer."
ODDS = "a = pi / n; log_odds = (a_c - a_r) - (log(1 - exp a_c) - log(1 - exp a_r)); nll - beta mean(logsigmoid(log_odds))"
add(
    "orpo",
    total,
    nll + ratio,
    ORPO + "get_batch_loss_metrics",
    ODDS + "; nll: mean over all predicted tokens of the chosen sequences of the batch, the prompt's (without its "
    "first) included",
    beta=0.1,
    nll=metrics["nll_loss"],
    nll_f64=nll,
    nll_tokens=predicted,
    ratio=ratio_part.item(),
    ratio_f64=ratio,
    log_odds=log_odds,
)
add(
    "orpo_completion",
    cross_entropy + ratio_part,
    completion_nll + ratio,
    ORPO + "odds_ratio_loss, with another nll",
    ODDS + "; nll: mean over the completion tokens of the chosen sequences of the batch; not TRL's",
    beta=0.1,
    nll=cross_entropy.item(),
    nll_f64=completion_nll,
    nll_tokens=sum(lengths["chosen"]),
    ratio=ratio_part.item(),
    ratio_f64=ratio,
)

# --- KTO

examples = [
    {"prompt_ids": pair["prompt"], "completion_ids": pair[side], "label": side == "chosen"}
    for pair in pairs
    for side in sides
]
# add_kl_completion_ids of KTOTrainer._prepare_dataset: the last completion first
rotated = [examples[-1]["completion_ids"]] + [example["completion_ids"] for example in examples[:-1]]
for example, other in zip(examples, rotated):
    example["KL_completion_ids"] = other
kto = trainer(KTOTrainer, beta=0.1, loss_type="kto", desirable_weight=1.0, undesirable_weight=1.5, calculate_KL=True)
loss = kto._compute_loss(model, DataCollatorForUnpairedPreference(pad_token_id=PAD)(examples), return_outputs=False)
mismatched = [both(example["prompt_ids"], example["KL_completion_ids"]) for example in examples]
raw = mean([p - r for p, r, _ in mismatched])
kl = max(raw, 0)
assert abs(kto._metrics["eval"]["kl"][0] - kl) < 1e-4
add(
    "kto",
    loss,
    mean(
        [1.0 * (1 - sigmoid(0.1 * (x - kl))) for x in ratios["chosen"]]
        + [1.5 * (1 - sigmoid(0.1 * (kl - x))) for x in ratios["rejected"]]
    ),
    "trl/trainer/kto_trainer.py KTOTrainer._compute_loss; rotation: add_kl_completion_ids in _prepare_dataset",
    "kl = max(0, mean over the mismatched of pi - ref), no gradient; x = pi - ref; desirable w_d (1 - sigmoid(beta (x - "
    "kl))), undesirable w_u (1 - sigmoid(beta (kl - x))); mean over all examples",
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.5,
    kl=kto._metrics["eval"]["kl"][0],
    kl_f64=kl,
    kl_before_clamp_f64=raw,
)

# --- losses of tokens: the completion tokens of the chosen sequences, mean over those of the batch

add(
    "ce",
    cross_entropy,
    completion_nll,
    "torch.nn.functional.cross_entropy",
    "mean of -log p",
)
scored = chosen_labels != -100
student, targets = chosen_logits[scored], chosen_labels[scored]
teacher = teacher_logits[:PAIRS, :-1].flatten(0, 1)[scored]
exact, exact_teacher = student.detach().double(), teacher.double()
uniform = -exact.log_softmax(-1).mean(-1).mean().item()
squares = exact.logsumexp(-1).square().mean().item()
divergence = F.kl_div(
    (exact / 2).log_softmax(-1), (exact_teacher / 2).log_softmax(-1), reduction="batchmean", log_target=True
).item()
add(
    "ce_smoothed",
    F.cross_entropy(student, targets, label_smoothing=0.1),
    0.9 * completion_nll + 0.1 * uniform,
    "torch.nn.functional.cross_entropy(label_smoothing=0.1)",
    "(1-e) ce + e mean over tokens and the whole vocabulary of -log p",
    label_smoothing=0.1,
)
add(
    "ce_z",
    cross_entropy + 1e-2 * student.logsumexp(-1).square().mean(),
    completion_nll + 1e-2 * squares,
    "written out",
    "ce + weight mean(logsumexp(logits)^2)",
    weight=1e-2,
    mean_square=squares,
)
kl_term = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), reduction="batchmean", log_target=True)
add(
    "distill",
    0.5 * cross_entropy + 0.5 * 4 * kl_term,
    0.5 * completion_nll + 0.5 * 4 * divergence,
    "written out",
    "(1-w) ce + w T^2 mean over tokens of KL(softmax(teacher / T) || softmax(student / T))",
    weight=0.5,
    temperature=2.0,
    ce=cross_entropy.item(),
    kl=divergence,
)

found = {
    "versions": {"trl": trl.__version__, "torch": torch.__version__.split("+")[0]},
    "pairs": pairs,
    "logps": {"policy": policy, "reference": reference, "lengths": lengths},
    "kto_mismatched": [
        {"prompt": e["prompt_ids"], "completion": e["KL_completion_ids"], "policy": p, "reference": r}
        for e, (p, r, _) in zip(examples, mismatched)
    ],
    "losses": losses,
}
with open(f"{out}/losses.json", "w") as file:
    json.dump(found, file, indent=1)
save_file(gradients, f"{out}/losses.safetensors")
