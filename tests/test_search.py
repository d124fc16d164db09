"""The search over a merge's coefficients and settings: what it finds, how it goes on, what it refuses, its metrics."""

import json
import sys
from pathlib import Path

import evaluate as metrics
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from hf_modular import cli, search
from hf_modular.merging import MergeRecipe, merge
from hf_modular.searching import Command, Validation
from hf_modular.searching._evolution import evolve
from hf_modular.searching._space import Space, parsed


@pytest.fixture
def recipe(tmp_path):
    """Of three models, with numbers of which the best are known."""
    for i, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(i)
        save_file({"w": torch.randn(6, 5, generator=generator)}, tmp_path / name / "model.safetensors")
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name)} for name in ("one", "two")],
    }


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")["w"]


@pytest.fixture
def distance(recipe):
    """How far a merge is from base + 0.3 d₁ + 1.4 d₂."""
    base, one, two = (weights(p) for p in (recipe["base_model"], *(entry["model"] for entry in recipe["models"])))
    target = base + 0.3 * (one - base) + 1.4 * (two - base)
    return lambda folder: float((weights(folder) - target).square().mean().sqrt())


def test_it_finds_the_best_coefficients(recipe, distance, tmp_path):
    report = search(recipe, distance, tmp_path / "found", budget=60, maximize=False, progress=False)
    assert len(report.trials) == 60
    assert report.trials[0].settings == {"models.0.weight": 1.0, "models.1.weight": 1.0}
    assert report.best.settings == pytest.approx({"models.0.weight": 0.3, "models.1.weight": 1.4}, abs=0.05)
    assert report.best.score == min(trial.score for trial in report.trials) < 0.1
    best = MergeRecipe.load(tmp_path / "found" / "best_recipe.yaml")
    assert [entry.parameters["weight"] for entry in best.models] == [*report.best.settings.values()]
    merge(best, tmp_path / "again", progress=False)
    assert distance(tmp_path / "again") == report.best.score
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [
        "best_recipe.yaml",
        "trials.jsonl",
        "trials.md",
        "trials.png",
    ]
    rows = (tmp_path / "found" / "trials.md").read_text().splitlines()
    assert rows[0] == "| trial | score | models.0.weight | models.1.weight | seconds |"
    assert rows[2].startswith(f"| 0 | {report.trials[0].score:.6g} | 1 | 1 |")
    assert [row for row in rows if "**" in row] == [rows[2 + report.best.number]]
    assert (tmp_path / "found" / "trials.png").read_bytes()[:4] == b"\x89PNG"
    assert report.summary().startswith(f"Trial {report.best.number} of 60 is the best with {report.best.score:.6g}; ")


class BrokenError(Exception):
    pass


def settings_of(report):
    return [(trial.settings, trial.score) for trial in report.trials]


def test_a_broken_search_goes_on_and_a_larger_budget_adds_to_it(recipe, distance, tmp_path):
    whole = search(recipe, distance, tmp_path / "whole", budget=17, maximize=False, seed=3, progress=False)
    calls = []

    def counted(folder):
        calls.append(folder)
        if len(calls) == 8:
            raise BrokenError
        return distance(folder)

    with pytest.raises(BrokenError):
        search(recipe, counted, tmp_path / "broken", budget=12, maximize=False, seed=3, progress=False)
    assert not (tmp_path / "broken" / "merged").exists()
    trials = tmp_path / "broken" / "trials.jsonl"
    trials.write_text(trials.read_text() + '{"number": 7, "sett')  # killed while writing
    search(recipe, counted, tmp_path / "broken", budget=12, maximize=False, seed=3, progress=False)
    assert len(calls) == 13
    report = search(recipe, counted, tmp_path / "broken", budget=17, maximize=False, seed=3, progress=False)
    assert settings_of(report) == settings_of(whole)
    assert len(calls) == 18
    less = search(recipe, counted, tmp_path / "broken", budget=5, maximize=False, seed=3, progress=False)
    assert settings_of(less) == settings_of(whole)[:5]


def test_seeds_differ_and_evaluations_may_draw_numbers(recipe, distance, tmp_path):
    import numpy as np

    def drawing(folder):
        np.random.default_rng().random()
        np.random.seed(len(str(folder)))
        return distance(folder)

    runs = [
        settings_of(search(recipe, how, tmp_path / str(i), budget=8, seed=seed, progress=False))
        for i, (how, seed) in enumerate([(distance, 0), (drawing, 0), (distance, 1)])
    ]
    assert runs[0] == runs[1] != runs[2]


def test_settings_choices_and_single_models(recipe, tmp_path):
    recipe |= {"merge_method": "ties", "parameters": {"density": 0.3}}
    seen = []

    def score(folder):
        found = MergeRecipe.load(folder / "merge_recipe.yaml")
        seen.append(found)
        density, weight = found.parameters["density"], found.models[1].parameters["weight"]
        return -abs(density - 0.8) - abs(weight - 0.5) - (found.parameters["election"] != "symmetric")

    space = {"density": (0.1, 1.0), "models.1.weight": (0, 2), "election": ["none", "symmetric", "mergekit"]}
    report = search(recipe, score, tmp_path / "found", space=space, budget=30, progress=False)
    assert report.trials[0].settings == {"density": 0.3, "models.1.weight": 1.0, "election": "mergekit"}
    assert report.best.settings["election"] == "symmetric"
    assert report.best.score > -0.5
    assert {entry.models[0].parameters.get("weight") for entry in seen} == {None}
    equal = [trial for trial in report.trials if trial.seconds == 0]
    assert len(seen) == 30 - len(equal)


def test_one_number_alone_and_a_budget_of_one(recipe, distance, tmp_path):
    space = {"models.1.weight": (1.0, 2.0)}
    recipe["models"][0]["parameters"] = {"weight": 0.3}
    report = search(recipe, distance, tmp_path / "found", space=space, budget=20, maximize=False, progress=False)
    assert report.best.settings["models.1.weight"] == pytest.approx(1.4, abs=0.05)
    one = search(recipe, distance, tmp_path / "one", space=space, budget=1, maximize=False, progress=False)
    assert len(one.trials) == 1


def test_what_cannot_be_merged_ranks_last(recipe, tmp_path):
    recipe |= {"merge_method": "della", "parameters": {"density": 0.5, "epsilon": 0.2}}

    def score(folder):
        return -MergeRecipe.load(folder / "merge_recipe.yaml").parameters["density"]

    report = search(recipe, score, tmp_path / "found", space={"density": (0.05, 0.95)}, budget=20, progress=False)
    refused = [trial for trial in report.trials if trial.score is None]
    assert refused
    assert all("must be in (0, 1)" in trial.refused and trial.settings["density"] <= 0.2 for trial in refused)
    assert report.best.settings["density"] == pytest.approx(0.2, abs=0.08)
    assert "| refused |" in report.table()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "there must be something to vary"),
        ({"densty": (0, 1)}, r"(?s)densty may not be 0\.0: .*has no setting 'densty'"),
        ({"density": (0.1, 1.7)}, r"(?s)density may not be 1\.7: .*`density` must be in \[0, 1\]"),
        ({"models.2.weight": (0, 1)}, "the recipe has the models 0 to 1, but got 'models.2.weight'"),
        ({"weight": (0, 1), "models.0.weight": (0, 2)}, r"may be varied once, but models\.0\.weight is named twice"),
        ({"weight": (1, 1)}, "weight must have a lower bound below the upper one"),
        ({"weight": 3}, "weight must have a tuple of two numbers, or a list of choices, but got 3"),
        ({"election": ["none"]}, "or a list of choices, but got"),
        ({"election": ["none", "some"]}, "election may not be 'some': "),
        ({"models/0": (0, 1)}, "a place must be a setting or"),
    ],
)
def test_spaces_that_are_refused(recipe, tmp_path, space, message):
    recipe |= {"merge_method": "ties"}
    with pytest.raises(ValueError, match=message):
        search(recipe, lambda folder: 0.0, tmp_path / "found", space=space)
    assert not (tmp_path / "found").exists()


def test_searches_that_are_refused(recipe, distance, tmp_path):
    with pytest.raises(ValueError, match="`budget` must be at least 1"):
        search(recipe, distance, tmp_path / "found", budget=0)
    with pytest.raises(ValueError, match="remove the key `state`"):
        search(recipe | {"merge_method": "opcm", "state": "s"}, distance, tmp_path / "found", space={"alpha": (0, 1)})
    with pytest.raises(ValueError, match="must give a finite number, but gave nan for"):
        search(recipe, lambda folder: float("nan"), tmp_path / "nan", progress=False)
    search(recipe, distance, tmp_path / "found", budget=1, progress=False)
    for change in ({"seed": 1}, {"space": {"weight": (0, 1)}}, {"maximize": False}):
        with pytest.raises(ValueError, match="is of a search with another recipe, space or seed"):
            search(recipe, distance, tmp_path / "found", budget=1, progress=False, **change)
    unlike = {"scale": (0.0, 1.0)}
    recipe["parameters"] = {"scale": 0.5}
    search(recipe, distance, tmp_path / "a", space=unlike, budget=3, progress=False)
    lines = (tmp_path / "a" / "trials.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"scale": ', '"scale": 1')
    (tmp_path / "a" / "trials.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"line 3 of .* must have the settings that this search comes to"):
        search(recipe, distance, tmp_path / "a", space=unlike, budget=3, progress=False)
    save_file({"w": torch.zeros(2)}, Path(recipe["base_model"]) / "model.safetensors")
    with pytest.raises(ValueError, match="none of 2 trials could be merged; the first: "):
        search(recipe, distance, tmp_path / "b", space=unlike, budget=2, progress=False)
    with pytest.raises(ValueError, match=r"none of \d+ trials could be merged"):
        search(recipe, distance, tmp_path / "c", space=unlike, budget=1000, progress=False)


def test_the_budget_is_spent_to_the_last_and_no_more():
    asked = []

    def costs(points):
        asked.extend(points)
        return [sum(point) for point in points]

    for budget in (0, 1, 7, 23):
        asked.clear()
        evolve([0.5, 0.5, 0.1], costs, budget, seed=0)
        assert len(asked) == budget
    assert all(0 <= x <= 1 for point in asked for x in point)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_costs_that_draw_it_to_the_edges_do_no_harm(size):
    for seed in range(1, 12, 2):
        asked = []
        evolve([0.5] * size, lambda points, asked=asked: asked.extend(points) or [-max(p) for p in points], 60, seed)
        assert len(asked) == 60 or size == 1


def test_spaces_as_texts(recipe):
    assert parsed(["weight=0:2", "models.0.t=-1e-1:.5", "election=none,symmetric", "flag=true,false", "k=1,2.5"]) == {
        "weight": (0.0, 2.0),
        "models.0.t": (-0.1, 0.5),
        "election": ["none", "symmetric"],
        "flag": [True, False],
        "k": [1, 2.5],
    }
    for wrong in ("weight", "weight=3", "weight="):
        with pytest.raises(ValueError, match="what to vary must be like weight=0:2"):
            parsed([wrong])
    with pytest.raises(ValueError, match="'a' is given twice"):
        parsed(["a=0:1", "a=0:2"])
    slices = [{"sources": [{"model": entry["model"], "layer_range": [0, 1]}]} for entry in recipe["models"]]
    stacked = MergeRecipe.load({"merge_method": "passthrough", "slices": slices})
    with pytest.raises(ValueError, match="the recipe lists no models whose 'weight' could be varied"):
        Space.of(stacked, {"weight": (0, 1)})
    space = Space.of(MergeRecipe.load(recipe), {"normalize": [True, False]})
    assert [space.settings([x])["normalize"] for x in (0.0, 0.49, 0.5, 1.0)] == [True, True, False, False]


SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["the cat sat", "the dog ran away", "the cat ran", "away", "the dog sat"]
WORDS = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A base with a tokenizer and two models, and labelled texts."""
    path = tmp_path_factory.mktemp("classifiers")
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        config = BertConfig(vocab_size=len(WORDS), num_labels=3, **SMALL)
        BertForSequenceClassification(config).save_pretrained(path / name)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(path / "base")
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    Dataset.from_list(rows).to_json(path / "rows.jsonl")
    recipe = {
        "merge_method": "linear",
        "base_model": str(path / "base"),
        "models": [{"model": str(path / name)} for name in ("base", "one", "two")],
    }
    (path / "recipe.yaml").write_text(json.dumps(recipe))
    return path


def tokens():
    ids = [[WORDS.index(word) for word in text.split()] for text in TEXTS]
    return [{"input_ids": x, "label": i % 3, "text": TEXTS[i]} for i, x in enumerate(ids)]


def one_by_one(model):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in tokens()]


METRIC = """
import datasets
import evaluate

class Largest(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references))
        return {"right": sum(p == r for p, r in pairs), "largest": max(predictions)}
"""


def test_metrics_of_classes(classifiers, tmp_path):
    model = BertForSequenceClassification.from_pretrained(classifiers / "one").eval()
    logits = one_by_one(model)
    right = [int(z.argmax()) == row["label"] for z, row in zip(logits, tokens(), strict=True)]
    for batch_size in (1, 2, 32):
        found = Validation(tokens(), batch_size=batch_size)(classifiers / "one")
        assert found == pytest.approx(sum(right) / len(right))
    losses = [float(-z.log_softmax(-1)[row["label"]]) for z, row in zip(logits, tokens(), strict=True)]
    assert Validation(tokens(), "loss").of_model(model) == pytest.approx(-sum(losses) / len(losses), rel=1e-5)
    (tmp_path / "largest.py").write_text(METRIC)
    metric = metrics.load(str(tmp_path / "largest.py"))
    assert Validation(tokens(), metric, key="right").of_model(model) == sum(right)
    assert Validation(tokens(), metric, key="largest").of_model(model) == max(int(z.argmax()) for z in logits)
    with pytest.raises(ValueError, match=r"`key` must be one of \['largest', 'right'\]"):
        Validation(tokens(), metric).of_model(model)


def test_the_loss_of_a_language_model_is_that_of_a_token():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    rows = [{"input_ids": [3, 1, 4, 1]}, {"input_ids": [5, 9, 2, 6, 5, 3]}, {"input_ids": [5, 8, 9, 7]}]
    model.eval()
    terms = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        terms += [float(log_p[t, ids[0, t + 1]].detach()) for t in range(ids.shape[1] - 1)]
    assert Validation(rows, "loss", batch_size=2).of_model(model) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    with pytest.raises(ValueError, match="a metric needs labels"):
        Validation(rows).of_model(model)


def test_validations_that_are_refused(classifiers):
    with pytest.raises(ValueError, match=r"evaluate\.load\('f1'\) runs code of the Hub, so call it yourself"):
        Validation(tokens(), "f1")
    with pytest.raises(ValueError, match="needs at least one example"):
        Validation([])
    with pytest.raises(ValueError, match="accuracy needs one class for each example"):
        Validation([{"input_ids": [3, 4], "labels": [1, 2]}])(classifiers / "one")


SCORE = "import sys, pathlib; print('hello'); print(len(list(pathlib.Path(sys.argv[1]).iterdir())) / 2)"


def test_commands(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "x").touch()
    assert Command(f'{sys.executable} -c "{SCORE}" {{model}}')(folder) == 0.5
    with pytest.raises(ValueError, match=r"must have \{model\}"):
        Command("true")
    with pytest.raises(ValueError, match="must print a number at last, but printed 'a model model'"):
        Command("echo a model {model}")(Path("model"))
    with pytest.raises(ValueError, match="must print a number at last, but printed ''"):
        Command("true {model}")(folder)
    with pytest.raises(ValueError, match="ended with 3: bad"):
        Command(f"{sys.executable} -c \"import sys; print('bad', file=sys.stderr); sys.exit(3)\" {{model}}")(folder)


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-modular", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


def test_on_the_command_line(classifiers, tmp_path, capsys, monkeypatch):
    start = ["search", classifiers / "recipe.yaml", tmp_path / "out", "--vary", "weight=0.1:1", "--budget", 3]
    code, out, err = run(capsys, monkeypatch, *start, "--dataset", classifiers / "rows.jsonl", "--metric", "loss")
    assert code == 0, err
    assert "of 3 is the best with" in out
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()[1:]]
    merge(classifiers / "recipe.yaml", tmp_path / "merged", progress=False)
    assert trials[0]["score"] == pytest.approx(Validation(tokens(), "loss")(tmp_path / "merged"))
    start[2] = tmp_path / "other"
    code, out, _ = run(capsys, monkeypatch, *start, "--command", f'{sys.executable} -c "{SCORE}" {{model}}', "-q")
    assert (code, out) == (0, "")
    assert run(capsys, monkeypatch, *start)[0] == 2
