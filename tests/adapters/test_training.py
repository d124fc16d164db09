"""Adapters are trained with what the ecosystem has: Trainer, autocast, gradient checkpointing, half precision."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from adapters import tiny
from adapters.conftest import adapted
from adapters.table import METHODS
from hf_modular.testing import AdapterCase

pytestmark = pytest.mark.parametrize("case", METHODS, ids=str)

DATA = [{"input_ids": tiny.TOKENS[i % 2] + i // 2, "labels": torch.tensor(i % 2)} for i in range(12)]


def trainer(case: AdapterCase, folder: Path, *, native: bool = False, **choices: object) -> Trainer:
    torch.manual_seed(3)
    config, model = case.config(task_type="SEQ_CLS", modules_to_save=["classifier"]), tiny.model("classifier")
    if native:
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        save_steps=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        dataloader_pin_memory=False,
        **choices,
    )
    return Trainer(model, arguments, train_dataset=DATA)


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_a_resumed_run_ends_as_the_uninterrupted_one(case: AdapterCase, tmp_path: Path) -> None:
    whole = trainer(case, tmp_path)
    start = {name: p.clone() for name, p in trained(whole.model).items()}
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {name.split(".default.")[0] for name, p in trained(whole.model).items() if not torch.equal(p, start[name])}
    assert moved == {name.split(".default.")[0] for name in start}
    resumed = trainer(case, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trained(resumed.model).keys() == trained(whole.model).keys()
    assert all(torch.equal(p, trained(whole.model)[name]) for name, p in trained(resumed.model).items())
    assert "import hf_modular" in (tmp_path / "checkpoint-6" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(tiny.model("classifier"), tmp_path / "checkpoint-6")
    assert torch.equal(tiny.run(loaded), tiny.run(whole.model.eval()))


@pytest.mark.parametrize("native", [False, True], ids=["in a PeftModel", "added to the model"])
def test_the_card_of_the_trainer_keeps_the_note(case: AdapterCase, native: bool, tmp_path: Path) -> None:
    """It is written anew when a run is pushed, over the README that was saved with the adapter."""
    ours = trainer(case, tmp_path, native=native)
    ours.save_model()
    ours.create_model_card(tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import hf_modular") == 1
    assert case.config_class.type_name in card.text
    assert "generated automatically according to the information the Trainer had" in card.text
    assert "mine" in card.data.tags or not native  # PEFT makes the tags anew
    loaded = PeftModel.from_pretrained(tiny.model("classifier"), tmp_path)
    assert torch.equal(tiny.run(loaded), tiny.run(ours.model.eval()))


def step(model: PeftModel, scale: float = 1.0) -> dict[str, Tensor]:
    """The gradients of one step; `scale` is what keeps them above fp16's smallest numbers on the way."""
    model.train()
    model.zero_grad()
    output = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS)
    (output.loss * scale).backward()
    return {name: p.grad / scale for name, p in trained(model).items()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(case: AdapterCase, use_reentrant: bool) -> None:
    model = adapted(case, "llama", target_modules=["q_proj", "down_proj"])
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.base_model.model.model.layers[0].gradient_checkpointing
    found = step(model)
    assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case: AdapterCase, dtype: torch.dtype) -> None:
    """fp32 weights, half precision products: gradients arrive in fp32 and are about those of fp32."""
    model = adapted(case, "llama", target_modules=["q_proj", "down_proj"])
    expected = step(model)
    with torch.autocast("cpu", dtype):
        found = step(model, scale=2.0**12)
        assert tiny.run(model).dtype == dtype
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.2, name


# an adapter that is in fp16 itself is beyond what AdamW can train, with this package as with PEFT
@pytest.mark.parametrize(
    ("half", "autocast_adapter_dtype"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)],
    ids=str,
)
def test_a_half_precision_base(
    case: AdapterCase, half: torch.dtype, autocast_adapter_dtype: bool, tmp_path: Path
) -> None:
    base = tiny.model("llama").to(half)
    model = get_peft_model(base, case.config(), autocast_adapter_dtype=autocast_adapter_dtype)
    dtype = torch.float32 if autocast_adapter_dtype else half
    assert {p.dtype for p in trained(model).values()} == {dtype}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.005)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("llama").to(half), tmp_path)
    assert tiny.run(loaded).dtype == half
    if autocast_adapter_dtype:
        assert torch.equal(tiny.run(loaded), tiny.run(model.eval()))


def test_a_frozen_adapter_is_not_trained(case: AdapterCase) -> None:
    model = get_peft_model(tiny.model("llama"), case.config(inference_mode=True))
    assert tiny.trainable(model) == 0
    model.set_adapter("default")
    assert tiny.trainable(model) > 0
    model.base_model.set_requires_grad("default", False)
    assert tiny.trainable(model) == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0), ()], ids=str)
def test_a_batch_of_no_tokens(case: AdapterCase, shape: tuple[int, ...]) -> None:
    """An expert of a mixture may get none; and a single one needs no axis of its own."""
    layer = adapted(case, "llama", target_modules=["q_proj"]).base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(*shape, 32, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    used = {name: p.grad for name, p in trained(layer).items() if p.grad is not None}
    assert used
    assert any(grad.any() for grad in used.values()) == (shape == ())
