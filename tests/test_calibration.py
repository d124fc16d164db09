"""What is measured of models on data for merging: sizes of activations, and the q of DAREx."""

import copy
import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_modular import activation_norms, cli, dare_q
from hf_modular.calibration._dare import two_grids
from hf_modular.checkpoints import Checkpoint
from hf_modular.merging import DAREConfig, MergeRecipe, merge, merge_state_dicts

SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
ROWS = [{"input_ids": torch.arange(length) * 3 % 19 + i % 2, "label": i % 3} for i, length in enumerate((5, 7, 5, 6))]


def bert(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **SMALL)).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def moved(model, size=0.05, seed=9):
    """Fine-tuned, as it were."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return tuned


@pytest.fixture(scope="module")
def pair():
    base = bert()
    return base, moved(base)


def seen_by(model, path):
    """All rows that go into a layer."""
    found = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda layer, x: found.append(x[0][0].detach()))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=row["input_ids"][None])
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found])


PATHS = {"bert.encoder.layer.1.output.dense": bert, "transformer.h.0.mlp.c_proj": gpt2, "lm_head": gpt2}


@pytest.mark.parametrize("path", PATHS)
def test_norms_of_inputs(path):
    model = PATHS[path]()
    expected = seen_by(model, path).square().mean(0).sqrt()
    shape = (-1, 1) if path.startswith("transformer") else (1, -1)
    for batch_size in (1, 3):
        found = activation_norms(model, ROWS, batch_size=batch_size)
        assert_close(found[f"{path}.weight"], expected.view(shape))
    assert all(
        (model.state_dict()[name] * tensor).shape == model.state_dict()[name].shape for name, tensor in found.items()
    )


def test_saved_norms_serve_a_merge(pair, tmp_path, capsys, monkeypatch):
    base, model = pair
    for name, one in (("base", base), ("model", model)):
        one.save_pretrained(tmp_path / name)
    norms = activation_norms(model, ROWS, tmp_path / "norms")
    assert json.loads((tmp_path / "norms" / "activations_config.json").read_text()) == {"examples": 4}
    with Checkpoint(tmp_path / "norms") as found:
        assert all(torch.equal(found.read(name), tensor) for name, tensor in norms.items())
    with pytest.raises(ValueError, match="norms"):
        activation_norms(model, ROWS, tmp_path / "norms")
    entry = {"model": str(tmp_path / "model"), "activations": str(tmp_path / "norms")}
    recipe = {"merge_method": "dare", "base_model": str(tmp_path / "base"), "models": [entry]}
    settings = {"mask": "wanda", "rescale": "none", "drop": 0.5}
    with pytest.warns(UserWarning, match="there is no 'activations' for"):
        merge(recipe | {"parameters": settings}, tmp_path / "out", progress=False)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    delta = model.state_dict()[name] - base.state_dict()[name]
    scores = delta.abs() * norms[name]
    kept = scores >= scores.sort(dim=1, descending=True).values[:, [delta.shape[1] // 2 - 1]]
    with Checkpoint(tmp_path / "out") as found:
        assert_close(found.read(name) - base.state_dict()[name], delta * kept, rtol=1e-4, atol=1e-6)


class OneLayer(nn.Module):
    """Of which everything is known."""

    def __init__(self, weight, bias):
        super().__init__()
        self.layer = nn.Linear(*reversed(weight.shape))
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            self.layer.bias.copy_(bias)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_closed_form_changes_the_output_least(shift):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(6, 30), torch.randn(6), torch.randn(40, 30) + shift
    base, model = OneLayer(torch.zeros(6, 30), torch.zeros(6)), OneLayer(weight + shift, bias)
    config = DAREConfig(drop=0.9)
    found = dare_q(base, model, config, [{"x": row} for row in x])
    assert found.config == DAREConfig(drop=0.9, rescale="q", q=found.layers["layer"])
    state = {"layer.weight": weight + shift, "layer.bias": bias}
    exact = x @ state["layer.weight"].T + bias

    def change(q):
        total = 0.0
        for seed in range(150):
            config = DAREConfig(drop=0.9, rescale="q", q=q)
            thin = merge_state_dicts(base.state_dict(), [state], config, seed=seed)
            total += float((x @ thin["layer.weight"].T + thin["layer.bias"] - exact).square().mean())
        return total

    best = change(found.config.q)
    assert all(best < change(q) for q in (0.7 * found.config.q, 1.4 * found.config.q) if 0.1 <= q <= 1)
    assert 0.1 < found.config.q <= 1


def test_each_layer_has_its_own(pair):
    base, model = pair
    found = dare_q(base, model, DAREConfig(drop=0.9), ROWS, batch_size=2)
    path = "bert.encoder.layer.1.output.dense"
    x = seen_by(model, path)
    layer, before = model.get_submodule(path), base.get_submodule(path)
    c = x[:, None] * (layer.weight - before.weight).detach()  # (rows, out, in)
    b = (layer.bias - before.bias).detach()
    squares = c.square().sum() + len(x) * b.square().sum()
    expected = 0.1 + 0.9 * float(squares / (c.sum(2) + b).square().sum())
    assert found.layers[path] == pytest.approx(min(expected, 1.0), rel=1e-4)
    assert len(found.layers) == 2 * 6 + 2
    assert min(found.layers.values()) <= found.config.q <= max(found.layers.values())


def test_the_numbers_go_into_a_recipe(pair):
    base, model = pair
    found = dare_q(base, model, DAREConfig(drop=0.9), ROWS)
    recipe = {
        "merge_method": "dare",
        "base_model": "base",
        "models": [{"model": "model", "parameters": found.parameters()}],
        "parameters": {"drop": 0.9, "rescale": "q"},
    }
    settings = MergeRecipe.load(recipe).settings
    for path, q in found.layers.items():
        for name in (f"{path}.weight", f"{path}.bias"):
            assert settings.at(name, 0.0).each["q"] == (q,)
    assert settings.at("bert.embeddings.LayerNorm.weight", 0.0).each["q"] == (found.config.q,)


def rule(c, p, eta):
    """The analytical rule, an output and a candidate at a time."""
    phi = (1 - 2 * p) / math.log((1 - p) / p)
    chosen = []
    for row in c.double():
        total, squares = float(row.sum()), float(row.square().sum())
        candidates = [1 - p + i * 1e-3 for i in range(round((0.998 - 1 + p) / 1e-3) + 1)]
        bounds = [
            abs(eta * (1 - (1 - p) / q) * total + eta**2 * phi * squares / (4 * q * q) + math.log(40))
            for q in candidates
        ]
        chosen.append(candidates[bounds.index(min(bounds))])
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize("eta", [0.3, 4.0, 30.0])
def test_the_analytical_rule(pair, eta):
    base, model = pair
    found = dare_q(base, model, DAREConfig(drop=0.9), ROWS, how="analytical", eta=eta)
    path = "bert.encoder.layer.0.attention.self.value"
    layer, before = model.get_submodule(path), base.get_submodule(path)
    d = (layer.weight - before.weight).detach() * seen_by(model, path).mean(0)
    c = torch.cat([d, (layer.bias - before.bias).detach()[:, None]], 1)
    assert found.layers[path] == pytest.approx(rule(c, 0.9, eta), abs=2e-3)
    assert found.config.q == pytest.approx(sum(found.layers.values()) / len(found.layers))


@pytest.mark.parametrize("make", [bert, gpt2])
def test_search_by_the_change_of_the_output(make):
    base = make()
    model = moved(base, 0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dare_q(base, model, DAREConfig(drop=0.9), ROWS, how="search", masks=2, step=0.2, seed=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.layers == {}
    assert found.parameters() == {"q": found.config.q}
    costs = dict(found.tried)
    assert costs[found.config.q] == min(costs.values()) < costs[0.1]
    changes = []
    for seed in (3, 4):
        thin = copy.deepcopy(model)
        thin.load_state_dict(merge_state_dicts(base.state_dict(), [model.state_dict()], found.config, seed=seed))
        parts = []
        with torch.no_grad():
            for row in ROWS:
                ids = row["input_ids"][None]
                wanted, got = (m(input_ids=ids, output_hidden_states=True) for m in (model, thin))
                if make is bert:
                    parts.append((wanted.hidden_states[-1] - got.hidden_states[-1]).abs().flatten())
                else:
                    top = wanted.logits.topk(5, -1).indices
                    parts.append((wanted.logits.gather(-1, top) - got.logits.gather(-1, top)).square().flatten())
        changes.append(float(torch.cat(parts).mean()))
    assert costs[found.config.q] == pytest.approx(sum(changes) / 2, rel=1e-3)


def test_validation_and_eta_by_an_evaluation(pair):
    base, model = pair
    name = "classifier.weight"

    def evaluate(thinned):
        """Best where the change is as large as half of the fine-tuned model's."""
        size = float((thinned.state_dict()[name] - base.state_dict()[name]).norm())
        return -abs(size - 0.5 * float((model.state_dict()[name] - base.state_dict()[name]).norm()))

    found = dare_q(base, model, DAREConfig(drop=0.8), how="validation", evaluate=evaluate, masks=3, step=0.1)
    costs = dict(found.tried)
    assert costs[found.config.q] == min(costs.values()) < 0.1
    by_eta = dare_q(
        base, model, DAREConfig(drop=0.8), ROWS, how="analytical", evaluate=evaluate, masks=2, step=2.0, high=12.0
    )
    eta = min(by_eta.tried, key=lambda pair: pair[1])[0]
    assert by_eta.layers == dare_q(base, model, DAREConfig(drop=0.8), ROWS, how="analytical", eta=eta).layers


def test_two_grids():
    asked = []

    def cost(x):
        asked.append(x)
        return (x - 0.437) ** 2

    best, tried = two_grids(cost, 0.1, 1.0, 0.1)
    assert best == pytest.approx(0.44)
    assert len(asked) == len(tried) == len({*asked})
    assert max(asked) <= 0.8 + 1e-9  # four steps past the best it gives up
    assert two_grids(lambda x: x, 0.1, 1.0, 0.1)[0] == 0.1
    assert two_grids(lambda x: -x, 0.01, 1.0, 0.05)[0] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"how": "guess"}, "`how` must be closed_form, analytical, search or validation"),
        ({"dataset": None}, "how='closed_form' needs a `dataset`"),
        ({"how": "validation"}, "how='validation' needs `evaluate`, but there is none"),
        ({"how": "analytical"}, "how='analytical' needs `evaluate` or `eta`, but there is none"),
        ({"config": DAREConfig(drop=0.0)}, "with drop=0 nothing is dropped"),
        ({"config": DAREConfig(mask="magnitude")}, "but got mask='magnitude'"),
        ({"base": {}}, "the base must have the tensors of the model, but lacks "),
        ({"dataset": []}, "needs at least one example, but the data set is empty"),
    ],
)
def test_refuses(pair, given, message):
    base, model = pair
    arguments = {"base": base, "config": DAREConfig(), "dataset": ROWS} | given
    with pytest.raises(ValueError, match=message):
        dare_q(arguments.pop("base"), model, arguments.pop("config"), arguments.pop("dataset"), **arguments)


def test_on_the_command_line(pair, tmp_path, capsys, monkeypatch):
    from datasets import Dataset

    pair[1].save_pretrained(tmp_path / "model")
    Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS]).to_json(tmp_path / "rows.jsonl")
    arguments = ["activations", tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out", "--tokens"]
    monkeypatch.setattr(sys, "argv", ["hf-modular", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "4 examples" in capsys.readouterr().out
    with Checkpoint(tmp_path / "out") as found:
        expected = activation_norms(pair[1], ROWS)
        assert all(torch.allclose(found.read(name), tensor) for name, tensor in expected.items())
