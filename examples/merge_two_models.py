"""Merge two models that were fine-tuned from one base, by a recipe written in Python.

python examples/merge_two_models.py
python examples/merge_two_models.py --base BASE --models MODEL_A MODEL_B --output merged
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

import hf_modular

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", help="folder or Hub id; by default tiny models of bytes are trained here and now")
parser.add_argument("--models", nargs=2, help="folders or Hub ids of models fine-tuned from the base")
parser.add_argument("--scale", type=float, default=0.5)
parser.add_argument("--output")
args = parser.parse_args()
work = Path(tempfile.mkdtemp())
output = args.output or work / "merged"

texts = {"code": "for i in range(10): print(i)\n", "verse": "Tyger Tyger, burning bright,\n"}
batches = {name: torch.tensor([list((text * 4).encode())]) for name, text in texts.items()}


def train(folder, start, tokens):
    model = start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def new_model():
    set_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=256, **tiny))


tiny_models = args.base is None
if tiny_models:
    args.base, args.models = str(work / "base"), [str(work / name) for name in texts]
    train(args.base, new_model, torch.arange(32, 127)[None])
    for name, tokens in batches.items():
        train(work / name, lambda: AutoModelForCausalLM.from_pretrained(args.base), tokens)

recipe = hf_modular.MergeRecipe.of(hf_modular.TaskArithmeticConfig(scale=args.scale), args.models, args.base)
print(recipe.to_yaml())
print(f"{hf_modular.merge(recipe, output).summary()}: {output}")

for name in [args.base, *args.models, output] if tiny_models else []:
    model = AutoModelForCausalLM.from_pretrained(name)
    losses = {text: model(input_ids=tokens, labels=tokens).loss.item() for text, tokens in batches.items()}
    print(f"{Path(name).name:8}", {text: round(loss, 2) for text, loss in losses.items()})
