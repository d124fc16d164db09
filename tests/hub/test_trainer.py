"""`Trainer(push_to_hub=True)`, and our card over the Trainer's."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, inputs, logits
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_modular import HUTConfig, SSFConfig, push_to_hub

# the Trainer turns the progress bars on again, which the environment of the tests forbids
pytestmark = pytest.mark.filterwarnings("ignore:Cannot enable progress bars:UserWarning")

REPO = "tester/trained"
TARGETS = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


@pytest.fixture(params=[LoraConfig, HUTConfig, SSFConfig], ids=lambda config: config.__name__)
def trainer(request, hub, publish, bases, tmp_path) -> Trainer:
    base = CONFIGS["bert"][0].from_pretrained(publish(bases["bert"], "tester/base"))
    ids = inputs("bert")["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [0, 1, 0]}).with_format("torch")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy="every_save",
        save_strategy="steps",
        save_steps=2,
        max_steps=3,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    return Trainer(get_peft_model(base, request.param(**TARGETS)), arguments, train_dataset=data, eval_dataset=data)


def test_the_trainer_pushes_and_our_push_completes_its_card(trainer, hub, bases):
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    data = ModelCard.load(REPO).data
    assert (data.base_model, data.library_name) == ("tester/base", "peft")
    expected = logits(trainer.model, "bert")
    base = CONFIGS["bert"][0].from_pretrained("tester/base")
    assert torch.equal(logits(PeftModel.from_pretrained(deepcopy(base), REPO), "bert"), expected)

    push_to_hub(trainer.args.output_dir, REPO)
    card = ModelCard(hub.repos[REPO].files["README.md"].data.decode())
    assert card.data.base_model_relation == "adapter"
    assert card.data.license == "apache-2.0"
    assert "- seed: 3\n" in card.text.split("## Training procedure")[1].split("\n## ")[0]
    assert "- Loss: " in card.text.split("## Evaluation")[1].split("\n## ")[0]
    assert "More information needed" not in card.text
    assert Path(trainer.args.output_dir, "checkpoint-2").is_dir()
    assert not any(name.startswith("checkpoint-2") for name in hub.repos[REPO].files)
    assert torch.equal(logits(PeftModel.from_pretrained(base, REPO), "bert"), expected)
