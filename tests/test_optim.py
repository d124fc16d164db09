"""AdamR: its formula, what it is equal to, what it pulls to, resuming, and the Trainer."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from adapters import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_modular import AdamR, HUTConfig, SSFConfig, optim
from hf_modular.adapters import MoSConfig

SHAPES = [(3, 4), (5,), (2, 3, 2)]


def parameters(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def give_gradients(parameters, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def by_the_formula(parameters, steps, lr, pull, norm, normalize=True, betas=(0.9, 0.999), eps=1e-8):
    """The formula of the module, a parameter at a time."""
    W0 = [p.detach().clone() for p in parameters]
    W, m, v = W0, [torch.zeros_like(p) for p in W0], [torch.zeros_like(p) for p in W0]
    for t in range(1, steps + 1):
        give_gradients(parameters, t)
        g = [p.grad for p in parameters]
        m = [betas[0] * m[i] + (1 - betas[0]) * g[i] for i in range(len(W))]
        v = [betas[1] * v[i] + (1 - betas[1]) * g[i] ** 2 for i in range(len(W))]
        v_hat = [x / (1 - betas[1] ** t) for x in v]
        mean = torch.cat([x.flatten() for x in v_hat]).mean().sqrt() if normalize else 1
        c = lr * pull / mean
        away = [x - x0 for x, x0 in zip(W, W0, strict=True)]
        pulls = [min(c, 1) * d if norm == "l2" else d.sign() * d.abs().clamp(max=float(c)) for d in away]
        moves = [lr * (m[i] / (1 - betas[0] ** t)) / (v_hat[i].sqrt() + eps) for i in range(len(W))]
        W = [W[i] - pulls[i] - moves[i] for i in range(len(W))]
    return W


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("pull", [0.3, 40.0])
def test_the_formula(norm, pull, normalize, monkeypatch):
    expected = by_the_formula(parameters(0), 9, 0.1, pull, norm, normalize)
    for bucket in (1, 13, 1 << 20):
        monkeypatch.setattr(optim, "_BUCKETS", {"cpu": bucket})
        found = parameters(0)
        optimizer = AdamR(found, lr=0.1, pull=pull, norm=norm, normalize=normalize)
        for t in range(1, 10):
            give_gradients(found, t)
            optimizer.step()
        torch.testing.assert_close([p.detach() for p in found], expected, rtol=1e-6, atol=1e-7)


@given(
    lr=st.floats(1e-4, 0.3),
    decay=st.sampled_from([0.0, 0.05, 0.4]),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.999)),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_without_a_pull_it_is_adam_and_pulled_to_zero_it_is_adamw(lr, decay, betas, seed):
    ours, theirs = parameters(seed), parameters(seed)
    how = {"pull": 0.0} if decay == 0 else {"anchor": 0.0, "pull": decay, "normalize": False}
    one = AdamR(ours, lr=lr, betas=betas, **how)
    other = torch.optim.AdamW(theirs, lr=lr, betas=betas, weight_decay=decay)
    for step in range(4):
        for optimizer, group in ((one, ours), (other, theirs)):
            give_gradients(group, seed + step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_without_gradients_the_differences_shrink_by_exactly_the_share():
    moving, still = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([1.0, -3.0]))
    optimizer = AdamR([moving, still], lr=0.1, pull=0.5, betas=(0.0, 0.0))
    with torch.no_grad():
        still += torch.tensor([4.0, -8.0])
    for step in range(1, 5):
        moving.grad, still.grad = torch.tensor([3.0]), torch.zeros(2)
        optimizer.step()
        c = 0.1 * 0.5 / (9 / 3) ** 0.5  # two of the three squares are 0
        away = torch.tensor([4.0, -8.0]) * (1 - c) ** step
        torch.testing.assert_close(still.detach(), torch.tensor([1.0, -3.0]) + away)


def test_on_a_quadratic_it_ends_between_the_target_and_the_start():
    start, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, -2.5, 0.5])
    distances = []
    for pull in (0.0, 0.02, 0.2):
        W = nn.Parameter(start.clone())
        optimizer = AdamR([W], lr=0.03, pull=pull, eps=1.0, betas=(0.0, 0.0), normalize=False)
        for _ in range(1400):
            W.grad = W.detach() - target
            optimizer.step()
        g = W.detach() - target  # where it rests: lr pull (W - W₀) = -lr g / (|g| + 1)
        torch.testing.assert_close(pull * (W.detach() - start), -g / (g.abs() + 1), rtol=1e-3, atol=1e-4)
        distances.append(float((W.detach() - start).norm()))
    assert distances[0] > distances[1] > distances[2] > 0.1


def test_l1_brings_differences_back_to_nothing_and_not_beyond():
    W = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = AdamR([W], lr=0.1, pull=1.0, norm="l1", normalize=False)
    with torch.no_grad():
        W += torch.tensor([0.05, -0.25, 0.0])
    W.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(W.detach(), torch.tensor([1.0, 1.85, 3.0]))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_huge_pull_ends_at_the_start_and_no_gradients_are_no_pull(norm):
    found = parameters(0)
    start = [p.detach().clone() for p in found]
    optimizer = AdamR(found, lr=1e-9, pull=1e12, norm=norm)
    with torch.no_grad():
        for p in found:
            p += 1
            p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in found], [x + 1 for x in start])
    give_gradients(found, 1)
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in found], start)


def test_anchors_are_kept_on_the_cpu_once_and_constants_as_numbers():
    W, ones = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(5))
    original, copied = torch.randn(2, 2), nn.Parameter(torch.randn(2, 2))
    optimizer = AdamR([{"params": [W, ones]}, {"params": [copied], "anchor": [original]}])
    assert torch.equal(optimizer._anchors[W], W)
    assert optimizer._anchors[W].data_ptr() != W.data_ptr()
    assert optimizer._anchors[ones] == 1.0
    assert optimizer._anchors[copied] is original
    assert "anchors" not in optimizer.state_dict()  # accelerate moves what is there at the start to the accelerator
    for p in (W, ones, copied):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert [*optimizer.state_dict()["anchors"]] == [0, 1]


def test_saved_state_goes_on_as_if_nothing_had_happened():
    whole, resumed = parameters(0), parameters(0)
    one = AdamR(whole, lr=0.1, pull=3.0)
    for t in range(3):
        give_gradients(whole, t)
        one.step()
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        for p, to in zip(resumed, whole, strict=True):
            p.copy_(to)
    other = AdamR(resumed)  # of the weights in the middle: what is pulled to comes from the state
    other.load_state_dict(torch.load(buffer, weights_only=True))
    clone = copy.deepcopy(other)
    again = pickle.loads(pickle.dumps(other))
    for optimizer in (one, other, clone, again):
        found = optimizer.param_groups[0]["params"]
        give_gradients(found, 9)
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(found, whole, strict=True))


def test_groups_have_settings_of_their_own():
    a, b, c = (nn.Parameter(torch.full((3,), 2.0)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "anchor": None}, {"params": [c], "pull": 0.0}]
    optimizer = AdamR(groups, lr=0.1, pull=2.0, normalize=False)
    with torch.no_grad():
        for p in (a, b, c):
            p += 1
            p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(b, torch.full((3,), 3.0))
    assert torch.equal(c, b)
    torch.testing.assert_close(a.detach(), torch.full((3,), 2.8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "`lr` must not be below 0, but got lr=-1.0"),
        ({"pull": -0.1}, "`pull` must not be below 0"),
        ({"betas": (0.9, 1.0)}, r"`betas` must be in \[0, 1\)"),
        ({"eps": -1e-8}, "`eps` must not be below 0"),
        ({"norm": "l3"}, "`norm` must be 'l2' or 'l1', but got norm='l3'"),
        ({"anchor": "base"}, "`anchor` must be 'start', a number, tensors or None"),
        ({"anchor": [torch.ones(3)] * 3}, r"of the shape \(3, 4\) must be pulled to what has the same"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        AdamR(parameters(0), **change)


def test_refuses_weight_decay_sparse_gradients_strange_states_and_replaced_parameters():
    found = parameters(0)
    with pytest.raises(ValueError, match=r"but got weight_decay=0\.1: set it to 0, and `pull` instead"):
        AdamR([{"params": found, "weight_decay": 0.1}])
    optimizer = AdamR(found)
    found[0].grad = torch.zeros(3, 4, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match="needs dense real gradients"):
        optimizer.step()
    give_gradients(found, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="must have anchors of 2 parameters, but has those of 3"):
        AdamR(found[:2]).load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["params"] = others = parameters(1)
    give_gradients(others, 0)
    with pytest.raises(ValueError, match="others have taken their place"):
        optimizer.step()


def test_bfloat16_weights():
    found = parameters(0, torch.bfloat16)
    optimizer = AdamR(found, lr=0.1, pull=1.0)
    for t in range(3):
        give_gradients(found, t)
        optimizer.step()
    expected = parameters(0, torch.float32)
    wide = AdamR(expected, lr=0.1, pull=1.0)
    for t in range(3):
        for p, q in zip(expected, found, strict=True):
            give_gradients(found, t)
            p.grad = q.grad.float()
        wide.step()
    torch.testing.assert_close([p.float() for p in found], expected, rtol=0.05, atol=0.03)
    assert all(p.dtype == torch.bfloat16 for p in found)


ADAPTERS = {
    "LoRA": (LoraConfig(r=2, target_modules=["query"]), {"lora_B": 0.0, "lora_A": None}),
    "LoRA of rank 1": (LoraConfig(r=1, target_modules=["query"]), {"lora_B": 0.0, "lora_A": None}),
    "DoRA": (LoraConfig(r=2, use_dora=True, target_modules=["query"]), {"magnitude": "start", "lora_A": None}),
    "(IA)3": (IA3Config(target_modules=["query"], feedforward_modules=[]), {"ia3_l": 1.0}),
    "SSF": (SSFConfig(init_weights="identity", target_modules=["query"]), {"scale": 1.0, "shift": 0.0}),
    "HUT": (HUTConfig(r=2, target_modules=["query"]), {".A": 1.0, ".B": 1.0, "scale": 1.0, "shift": 0.0}),
    "HUT, low-rank": (HUTConfig(r=2, form="low_rank", target_modules=["query"]), {".A": None, ".B": 0.0}),
    "MoS": (MoSConfig(r=2, target_modules=["query", "value"]), {".A": None, ".B": 0.0}),
}


@pytest.mark.parametrize(("config", "expected"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_is_pulled_to_where_it_changes_nothing(config, expected):
    model = get_peft_model(tiny.model("classifier"), copy.deepcopy(config))
    optimizer = AdamR.for_model(model)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    assert optimizer._anchors.keys() == names.keys()
    seen = set()
    for parameter, anchor in optimizer._anchors.items():
        for part in [part for part in expected if part in names[parameter]]:
            wanted = expected[part]
            assert torch.equal(anchor, parameter) if wanted == "start" else anchor == wanted
            seen.add(part)
    assert seen == expected.keys()


def test_what_lora_adds_shrinks_as_a_full_fine_tune_does():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), LoraConfig(r=2, target_modules=["0"]))
    optimizer = AdamR.for_model(model, lr=0.1, pull=2.0, normalize=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    before = layer.get_delta_weight("default").detach().clone()
    for parameter in optimizer.param_groups[0]["params"] + optimizer.param_groups[-1]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), 0.8 * before)


def test_copies_of_modules_are_pulled_to_the_originals_and_free_ones_to_nothing():
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier", "pooler"], task_type="SEQ_CLS")
    model = get_peft_model(tiny.model("classifier"), config)
    optimizer = AdamR.for_model(model, free="classifier")
    by_name = {name: optimizer._anchors[p] for name, p in model.named_parameters() if p.requires_grad}
    originals = {name.replace("original_module", ""): p for name, p in model.named_parameters() if "original" in name}
    pooled = {n.replace("modules_to_save.default", ""): a for n, a in by_name.items() if "pooler" in n}
    assert len(pooled) == 2
    assert all(anchor.data_ptr() == originals[name].data_ptr() for name, anchor in pooled.items())
    assert [anchor for name, anchor in by_name.items() if "classifier" in name] == [None, None]


def test_an_adapter_that_has_been_trained_or_starts_anywhere_is_refused(tmp_path):
    model = get_peft_model(
        tiny.model("classifier"), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("classifier"), tmp_path, is_trainable=True)
    for trained in (model, loaded, get_peft_model(tiny.model("classifier"), SSFConfig(target_modules=["query"]))):
        with pytest.raises(ValueError, match="an adapter must be new, so that it changes nothing yet, but base_model"):
            AdamR.for_model(trained)
    with pytest.raises(ValueError, match="must have parameters to train"):
        AdamR.for_model(tiny.model("bert").requires_grad_(False))


DATA = [{"input_ids": tiny.TOKENS[i % 2] + i // 2, "labels": torch.tensor(i % 2)} for i in range(12)]


def full():
    return tiny.model("classifier")


def with_lora():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    return get_peft_model(tiny.model("classifier"), config)


def trainer(make, folder, pull):
    model = make()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        save_steps=4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        dataloader_pin_memory=False,
    )
    optimizer = AdamR.for_model(model, lr=0.01, pull=pull)
    return Trainer(model, arguments, train_dataset=DATA, optimizers=(optimizer, None))


@pytest.mark.parametrize("make", [full, with_lora])
def test_in_the_trainer_it_learns_keeps_task_vectors_small_and_resumes(make, tmp_path):
    def trained(run):
        return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}

    def distance(run):
        anchors = run.optimizer.optimizer._anchors
        own = [p for p in run.model.parameters() if p.requires_grad and anchors[p] is not None]
        return sum(float((p.detach() - anchors[p]).square().sum()) for p in own) ** 0.5

    distances = []
    for pull in (0.0, 2.0):
        run = trainer(make, tmp_path / str(pull), pull)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        distances.append(distance(run))
    assert distances[1] < 0.8 * distances[0]
    resumed = trainer(make, tmp_path / "2.0", 2.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "2.0" / "checkpoint-4"))
    assert all(torch.equal(p, trained(run)[name]) for name, p in trained(resumed).items())


def test_the_trainer_can_make_it_by_itself(tmp_path):
    arguments = trainer(full, tmp_path, 0.0).args
    made = partial(Trainer, tiny.model("classifier"), train_dataset=DATA)
    run = made(args=arguments, optimizer_cls_and_kwargs=(AdamR, {"lr": 0.01, "pull": 1.0}))
    run.train()
    assert isinstance(run.optimizer.optimizer, AdamR)
