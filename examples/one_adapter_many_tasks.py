"""LoRA adapters of several tasks in one (RMM): each can be used at will, in one batch too, and had back as LoRA.

python examples/one_adapter_many_tasks.py
python examples/one_adapter_many_tasks.py --base BASE --adapters ADAPTER_A ADAPTER_B ADAPTER_C --p 1
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

import hf_modular

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", help="folder or Hub id; a tiny model of bytes is trained here and now by default")
parser.add_argument("--adapters", nargs=3, help="folders or Hub ids; trained here and now by default")
parser.add_argument("--p", type=int, default=1, help="directions in which the tasks may differ")
args = parser.parse_args()
work = Path(tempfile.mkdtemp())
texts = {"code": "for i in range(10): ", "verse": "Tyger Tyger, burning", "letter": "Dear Sir or Madam, I"}
batches = {name: torch.tensor([list(text.encode())]) for name, text in texts.items()}


def train(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def new_base():
    set_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=256, **tiny))


if args.base is None:
    args.base, args.adapters = str(work / "base"), [str(work / name) for name in texts]
    train(new_base(), torch.arange(32, 127)[None]).save_pretrained(args.base)
    for folder, tokens in zip(args.adapters, batches.values(), strict=True):
        base = AutoModelForCausalLM.from_pretrained(args.base)
        train(get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")), tokens).save_pretrained(folder)

recipe = {"merge_method": "rmm", "models": [{"model": name} for name in args.adapters], "parameters": {"p": args.p}}
print(hf_modular.merge_adapter_files(recipe | {"warn_above": 1}, work / "rmm").summary())

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.base), work / "rmm")
for task in model.tasks:
    model.set_task(task)
    losses = {name: round(model(input_ids=tokens, labels=tokens).loss.item(), 2) for name, tokens in batches.items()}
    print(f"with the task {task}: {losses}")
print("a task for each sample:", model(torch.cat([*batches.values()]), adapter_names=model.tasks).logits.shape)
model.revert(model.tasks[0], work / "back")
print("back as LoRA:", *sorted(path.name for path in (work / "back").iterdir()))
