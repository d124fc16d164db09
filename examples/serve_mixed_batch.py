"""Serve two adapters and the base model in one batch: each sample names the adapter that it wants.

python examples/serve_mixed_batch.py
python examples/serve_mixed_batch.py --base BASE --adapters ADAPTER_A ADAPTER_B --prompts "..." "..." "..."
"""

import argparse
import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_modular import HUTConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", help="folder or Hub id; a tiny random model of bytes by default")
parser.add_argument("--adapters", nargs=2, help="folders or Hub ids; two random HUT adapters by default")
parser.add_argument("--prompts", nargs=3, default=["Once upon a time", "import torch", "Dear Sir or Madam"])
args = parser.parse_args()


def load_base():
    if args.base:
        return AutoModelForCausalLM.from_pretrained(args.base)
    set_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=256, **tiny))


def make_adapter(seed):
    folder = tempfile.mkdtemp()
    set_seed(seed)  # init_weights=False starts at random, as if it had been trained
    get_peft_model(load_base(), HUTConfig(init_weights=False, target_modules="all-linear")).save_pretrained(folder)
    return folder


def encode(prompts):
    if args.base:
        tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer(prompts, return_tensors="pt", padding=True)
    return {"input_ids": torch.tensor([list(prompt.encode())[:12] for prompt in prompts])}


first, second = args.adapters or [make_adapter(1), make_adapter(2)]
model = PeftModel.from_pretrained(load_base(), first, adapter_name="first")
model.load_adapter(second, adapter_name="second")
model.eval()

names = ["first", "second", "__base__"]  # one for each sample
batch = encode(args.prompts)
with torch.no_grad():
    together = model(**batch, adapter_names=names).logits[:, -1]
    for i, name in enumerate(names):
        alone = model(**{k: v[[i]] for k, v in batch.items()}, adapter_names=[name]).logits[0, -1]
        print(f"{name:8} difference from the same sample alone: {float((together[i] - alone).abs().max()):.1e}")
