"""LoRA adapters of several tasks in one (RMM): each can be used at will, in one batch with others, and had back.

python examples/one_adapter_many_tasks.py [MODEL]    # a language model's folder or Hub id; a tiny one by default
"""

import sys
import tempfile

from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, set_seed

from hf_modular import AdapterRecipe, RMMConfig, merge_adapter_files

texts = {"letter": "Dear Sir or Madam, I", "diary": "Dear diary, today I", "verse": "Dear heart, the Tyger"}
work = tempfile.mkdtemp()
set_seed(0)
tiny = LlamaConfig(vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1)
base, tokenizer = AutoModelForCausalLM.from_config(tiny), ByT5Tokenizer()
if sys.argv[1:]:
    base, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))

for task, text in texts.items():  # a LoRA adapter that knows it by heart
    set_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    tokens, optimizer = tokenizer(text, return_tensors="pt"), AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**tokens, labels=tokens.input_ids).loss.backward()
        optimizer.step()
    model.save_pretrained(f"{work}/{task}")
    base = model.unload()

recipe = AdapterRecipe.of(RMMConfig(p=1), [f"{work}/{task}" for task in texts], warn_above=1)
print(merge_adapter_files(recipe, f"{work}/rmm").summary())
model = PeftModel.from_pretrained(base, f"{work}/rmm")
prompts = tokenizer(["Dear"] * 3, return_tensors="pt", add_special_tokens=False)
print(tokenizer.batch_decode(model.generate(**prompts, adapter_names=model.tasks, max_length=20)))
model.set_task("verse")  # from now on for every sample that names none
model.revert("verse", f"{work}/verse-again")  # a LoRA adapter like any other
