"""Fisher information: against loops of single backward passes, for each kind of model, labels and process count."""

import json
import subprocess
import sys
from contextlib import nullcontext as nothing
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_modular import fisher_information
from hf_modular.checkpoints import Checkpoint
from hf_modular.fisher import _examples, _likelihood
from hf_modular.merging import FisherConfig, merge_state_dicts

SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY = 29


def made(kind, config):
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # so that no gradient is small for symmetry
    return model.eval()


@pytest.fixture(scope="module")
def bert():
    return made(BertForSequenceClassification, BertConfig(vocab_size=VOCABULARY, num_labels=3, **SMALL))


@pytest.fixture(scope="module")
def llama():
    return made(LlamaForCausalLM, LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **SMALL))


def texts(count=7, labels=3, lengths=(4, 6)):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, VOCABULARY, (lengths[i % len(lengths)],), generator=generator).tolist(),
            "attention_mask": [1] * lengths[i % len(lengths)],
            "label": i % labels,
            "source": "a column that the model does not take",
        }
        for i in range(count)
    ]


def squares(model, score):
    model.zero_grad()
    score.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.square() for n, p in model.named_parameters()}


def logits_of(model, row):
    inputs = {k: torch.tensor(row[k])[None] for k in ("input_ids", "attention_mask") if k in row}
    return model(**inputs).logits[0]


def added(total, terms, weight=1.0):
    return {name: total.get(name, 0) + weight * term for name, term in terms.items()}


def close(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())  # some gradients are 0 but for rounding
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def by_loops(model, data, weight_and_score):
    total = {}
    for row in data:
        for k in range(10**6):
            pair = weight_and_score(logits_of(model, row), row, k)
            if pair is None:
                break
            total = added(total, squares(model, pair[1]), float(torch.as_tensor(pair[0]).detach()) / len(data))
    return total


def expected_class(logits, row, k):
    log_p = logits.log_softmax(-1)
    return (log_p[k].exp(), log_p[k]) if k < len(log_p) else None


def test_classes_by_their_probability(bert):
    data = texts()
    close(fisher_information(bert, data, batch_size=3), by_loops(bert, data, expected_class))


def test_it_is_not_the_squared_gradient_of_the_batch(bert):
    data = texts()
    biased = {}
    score = sum((log_p := logits_of(bert, row).log_softmax(-1)).mul(log_p.detach().exp().sqrt()).sum() for row in data)
    biased = added(biased, squares(bert, score), 1 / len(data))
    found = fisher_information(bert, data)
    assert not torch.allclose(found["classifier.weight"], biased["classifier.weight"], rtol=0.05)


def test_given_labels_are_the_empirical_fisher_information(bert):
    data = texts()
    expected = by_loops(bert, data, lambda z, row, k: (1, z.log_softmax(-1)[row["label"]]) if k == 0 else None)
    close(fisher_information(bert, data, labels="given"), expected)


def test_sampled_labels_tend_to_the_expectation(bert):
    data = texts(2)
    exact = fisher_information(bert, data, include="classifier")
    sampled = fisher_information(bert, data * 400, include="classifier", labels="sampled", batch_size=100)
    close(sampled, exact, tolerance=0.15)
    again = fisher_information(bert, data * 3, include="classifier", labels="sampled", seed=1)
    assert not torch.equal(
        again["classifier.bias"], fisher_information(bert, data * 3, labels="sampled")["classifier.bias"]
    )


@pytest.mark.parametrize("shared_mask", [True, False])
def test_padding_changes_nothing(bert, shared_mask):
    data = texts()
    lengths = [8] * len(data) if shared_mask else [8 + i % 2 for i in range(len(data))]
    padded = []
    for row, length in zip(data, lengths, strict=True):
        missing = length - len(row["input_ids"])
        padded.append(
            {
                **row,
                "input_ids": row["input_ids"] + [0] * missing,
                "attention_mask": row["attention_mask"] + [0] * missing,
            }
        )
    expected = fisher_information(bert, data, include="layer|classifier")
    close(fisher_information(bert, padded, include="layer|classifier"), expected, tolerance=1e-5)


def test_one_by_one_where_vmap_cannot():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) * (2 if float(x.sum()) > 0 else 1)

    torch.manual_seed(0)
    model = Deciding()
    data = [{"x": x} for x in torch.randn(5, 4)]
    with pytest.warns(UserWarning, match="taken one by one, since vmap cannot map the model"):
        found = fisher_information(model, data)
    total = {}
    for row in data:
        log_p = model(row["x"]).log_softmax(-1)
        for k in range(3):
            total = added(
                total, squares(model, model(row["x"]).log_softmax(-1)[k]), float(log_p[k].detach().exp()) / 5
            )
    close(found, total)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
def test_numbers_and_yes_or_no(problem):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1 if problem is None else 3))
    data = [{"input": x} for x in torch.randn(6, 4)]
    total = {}
    for row in data:
        for k in range(1 if problem is None else 3):
            z = model(row["input"])[k]
            p = z.detach().sigmoid()
            weight = p * (1 - p) if problem == "multi_label_classification" else 1.0
            total = added(total, squares(model, z), float(weight) / 6)
    close(fisher_information(model, data, problem=problem), total)


def test_a_linear_softmax_model_in_closed_form():
    """∂ log p(k|x)/∂W = (e_k - p) xᵀ, so F of W_ab is E p_a (1 - p_a) x_b²."""
    torch.manual_seed(2)
    model, x = nn.Linear(4, 3, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    p = model(x).softmax(-1).detach()
    found = fisher_information(model, [{"input": row} for row in x])
    torch.testing.assert_close(found["weight"].double(), (p * (1 - p)).T @ x.square() / 20, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["bias"].double(), (p * (1 - p)).mean(0), rtol=1e-6, atol=0)


def test_tokens_are_sampled_at_each_place_of_a_causal_model(llama):
    data = [{"input_ids": row["input_ids"]} for row in texts(5)]
    found = fisher_information(llama, data, batch_size=2)
    reader, total = _examples.Reader(llama, "auto"), {}
    for i, row in enumerate(data):
        logits = logits_of(llama, row)[:-1]
        draws = reader.example(row, i)["draws"][1:]
        drawn = [int((z.softmax(-1).cumsum(-1) <= u).sum()) for z, u in zip(logits.detach(), draws, strict=True)]
        score = logits.log_softmax(-1)[range(len(drawn)), drawn].sum()
        total = added(total, squares(llama, score), 1 / len(data))
    close(found, total)


def test_labels_of_a_causal_model_are_shifted_and_may_be_left_out(llama):
    data = [{"input_ids": row["input_ids"], "labels": [-100, -100, *row["input_ids"][2:]]} for row in texts(4)]
    total = {}
    for row in data:
        log_p = logits_of(llama, row)[1:-1].log_softmax(-1)
        score = log_p[range(len(log_p)), row["input_ids"][2:]].sum()
        total = added(total, squares(llama, score), 1 / len(data))
    close(fisher_information(llama, data, labels="given"), total)


OTHERS = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0),
        lambda ids: {"input_ids": ids},
    ),
    "masked": (
        BertForMaskedLM,
        BertConfig(vocab_size=VOCABULARY, **SMALL),
        lambda ids: {"input_ids": ids, "labels": [-100, *ids[1:]]},
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_ff=20, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
        ),
        lambda ids: {"input_ids": ids, "decoder_input_ids": [0, *ids[:-1]], "labels": ids},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_language_models(name):
    kind, config, row = OTHERS[name]
    model = made(kind, config)
    data = [row(text["input_ids"]) for text in texts(4)]
    found = fisher_information(model, data, labels="given", batch_size=2)
    total = {}
    for example in data:
        batch = {key: torch.tensor(value)[None] for key, value in example.items()}
        loss = model(**{"labels": batch["input_ids"], **batch}).loss  # the mean over the places that count
        places = (
            sum(label != -100 for label in example["labels"]) if "labels" in example else len(example["input_ids"]) - 1
        )
        total = added(total, squares(model, -loss * places), 1 / len(data))
    stored = {name: tensor for name, tensor in found.items() if name in total}
    close(stored, total, tolerance=1e-5)
    ties = model.all_tied_weights_keys
    assert all(torch.equal(found[one], found[other]) for one, other in ties.items())
    assert found.keys() == {name for name in model.state_dict() if model.state_dict()[name].is_floating_point()}


def test_images():
    model = made(ViTForImageClassification, ViTConfig(image_size=4, patch_size=2, num_labels=2, **SMALL))
    data = [{"pixel_values": x.numpy()} for x in torch.randn(3, 3, 4, 4, dtype=torch.float64)]
    total = {}
    for row in data:
        x = torch.tensor(row["pixel_values"])[None].float()
        for k in range(2):
            log_p = model(pixel_values=x).logits[0].log_softmax(-1)
            total = added(total, squares(model, log_p[k]), float(log_p[k].detach().exp()) / 3)
    close(fisher_information(model, data), total)


@pytest.fixture
def adapted(bert):
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(made(type(bert), bert.config), config)
    return model.eval()


def test_of_a_peft_model_the_adapter_counts(adapted, tmp_path):
    data = texts(3)
    found = fisher_information(adapted, data)
    adapted.save_pretrained(tmp_path)
    with Checkpoint(tmp_path / "adapter_model.safetensors") as saved:
        assert found.keys() == saved.tensors.keys()
    total = {}
    for row in data:
        for k in range(3):
            log_p = logits_of(adapted, row).log_softmax(-1)
            terms = squares(adapted, log_p[k])
            own = {name.replace(".default", ""): term for name, term in terms.items() if "lora" in name}
            total = added(total, own, float(log_p[k].detach().exp()) / 3)
    close(found, total)


def test_or_the_model_with_the_adapter_merged(adapted, bert):
    data = texts(3)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    found = fisher_information(adapted, data, merged=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
    close(found, fisher_information(adapted.merge_and_unload(), data))
    with pytest.raises(ValueError, match="merged=True is for PEFT models, but got a BertForSequenceClassification"):
        fisher_information(bert, data, merged=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 7), st.integers(0, 10**6))
def test_a_drawn_label_follows_the_distribution(classes, seed):
    logits = torch.randn(classes, generator=torch.Generator().manual_seed(seed))
    draws = (torch.arange(1000) + 0.5) / 1000
    drawn = _likelihood._drawn(logits.expand(1000, classes), None, draws)
    shares = drawn.bincount(minlength=classes) / 1000
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=0.0021)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checkpoint_is_one_that_merging_takes(bert, dtype, tmp_path):
    found = fisher_information(bert, texts(4), tmp_path / "fisher", dtype=dtype)
    config = json.loads((tmp_path / "fisher" / "fisher_config.json").read_text())
    assert (config["root"], config["examples"], config["labels"]) == (dtype == "bfloat16", 4, "auto")
    with Checkpoint(tmp_path / "fisher") as saved:
        for name, tensor in found.items():
            stored = saved.read(name).float()
            torch.testing.assert_close(stored.square() if config["root"] else stored, tensor, rtol=0.01, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["fisher"]
    state = bert.state_dict()
    with pytest.warns(UserWarning, match="position_ids") if "bert.embeddings.position_ids" in state else nothing():
        merge_state_dicts(None, [state, state], FisherConfig(), companions={"fisher": [found, found]})


class Broken(list):
    """A data set that cannot be read to its end, the first time."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 70:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_broken_run_goes_on(bert, tmp_path):
    data = Broken(texts(100))
    options = {"include": "classifier", "batch_size": 2, "save_every": 0}
    with pytest.raises(KeyboardInterrupt):
        fisher_information(bert, data, tmp_path / "fisher", **options)
    with pytest.raises(ValueError, match="is of a run with another model, data set or settings: remove"):
        fisher_information(bert, data, tmp_path / "fisher", **options, seed=5)
    data.reads = 1000
    found = fisher_information(bert, data, tmp_path / "fisher", **options)
    assert data.reads < 1000 + 100
    close(found, fisher_information(bert, list(data), include="classifier"))
    assert [path.name for path in tmp_path.iterdir()] == ["fisher"]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "at least one example"),
        (texts(1), {"include": "nothing like this"}, "none of the model's matches include='nothing like this'"),
        ([{"text": "hello"}], {}, r"must have inputs of the model, .*input_ids.* but has \['text'\]"),
        ([{"input_ids": [1, 2]}], {"labels": "given"}, "needs `labels`, but the data has none"),
        (texts(1), {"problem": "regression", "labels": "sampled"}, "need not be sampled"),
    ],
)
@pytest.mark.filterwarnings("ignore:examples are taken one by one")
def test_refuses(bert, data, options, message):
    with pytest.raises(ValueError, match=message):
        fisher_information(bert, data, **options)


@pytest.mark.filterwarnings("ignore:examples are taken one by one")
def test_what_is_not_finite_or_too_much(llama):
    with pytest.raises(ValueError, match='labels="sampled"'):
        fisher_information(llama, [{"input_ids": [1, 2, 3]}], labels="expected")
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="that of weight is not"):
        fisher_information(model, [{"input": torch.tensor([1e30, 1.0])}], problem="regression")


PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_fisher_information import made, texts, BertForSequenceClassification, BertConfig, VOCABULARY, SMALL
from hf_modular import fisher_information
torch.set_num_threads(1)
bert = made(BertForSequenceClassification, BertConfig(vocab_size=VOCABULARY, num_labels=3, **SMALL))
for labels in ("expected", "sampled"):
    fisher_information(bert, texts(7), sys.argv[2] + labels, labels=labels, batch_size=2)
"""


def test_two_processes_find_what_one_does(bert, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESS)
    options = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script)]
    arguments = [str(Path(__file__).parent), str(tmp_path / "fisher-")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    for labels in ("expected", "sampled"):
        expected = fisher_information(bert, texts(7), labels=labels)
        with Checkpoint(tmp_path / f"fisher-{labels}") as saved:
            close({name: saved.read(name) for name in saved.tensors}, expected)
