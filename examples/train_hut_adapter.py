"""Train a HUT adapter for handwritten digits with transformers.Trainer, save it, and load it again.

python examples/train_hut_adapter.py
python examples/train_hut_adapter.py --model google/vit-base-patch16-224-in21k --rate 3e-3
"""

import argparse
import tempfile

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from hf_modular import HUTConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or Hub id of an image classifier; a tiny untrained ViT by default")
parser.add_argument("--rate", type=float, default=3e-2)
parser.add_argument("--epochs", type=float, default=6)
parser.add_argument("--output", default=None)
args = parser.parse_args()
output = args.output or tempfile.mkdtemp()


def load_base():
    set_seed(0)
    if args.model:
        return AutoModelForImageClassification.from_pretrained(args.model, num_labels=10, ignore_mismatched_sizes=True)
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = AutoConfig.for_model("vit", image_size=8, patch_size=4, num_channels=1, num_labels=10, **tiny)
    return AutoModelForImageClassification.from_config(config)


model = load_base()
scans = load_digits()
images = torch.tensor(scans.images, dtype=torch.float32)[:, None] / 8 - 1
size, channels = model.config.image_size, model.config.num_channels
images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear").expand(-1, channels, -1, -1)
rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, scans.target, strict=True)]
train, test = rows[:1400], rows[1400:]

# every linear layer but the head, which is new and trained whole
config = HUTConfig(r=8, target_modules="all-linear", exclude_modules=["classifier"], modules_to_save=["classifier"])
model = get_peft_model(model, config)
model.print_trainable_parameters()

settings = {"learning_rate": args.rate, "num_train_epochs": args.epochs, "per_device_train_batch_size": 32}
arguments = TrainingArguments(output, save_strategy="no", report_to="none", **settings)
trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test)
trainer.compute_metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
trainer.train()
model.save_pretrained(output)

trainer.model = PeftModel.from_pretrained(load_base(), output).merge_and_unload()
print(f"accuracy of the reloaded and merged adapter: {trainer.evaluate()['eval_accuracy']:.3f}; it is in {output}")
