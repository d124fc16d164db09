"""The tasks that quality is measured on: real splits, the same data every time, heads that are what they should be."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tasks import Classifier, Split, Suite, Task, digits, docstrings, features, load_task, probe, save_task, text
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForImageClassification, BertConfig, BertModel, PreTrainedTokenizerFast

SIZES = {"train": 32, "val": 24, "test": 32}
BENCHMARKS = Path(text.__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return digits.suite(tmp_path_factory.mktemp("cache"), tuple(digits.VIEWS), base_epochs=1)


@pytest.fixture(scope="module")
def few_files() -> pytest.MonkeyPatch:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "FILES", 40)
        patch.setattr(docstrings, "LIBRARIES", ("numpy", "sklearn"))
        patch.setattr(docstrings, "LEAST", 8)
        docstrings.harvest.cache_clear()
        yield patch
    docstrings.harvest.cache_clear()


@pytest.fixture(scope="module")
def texts(few_files: pytest.MonkeyPatch) -> dict[str, Task]:
    """Those of the docstring tasks, made with a model of a few hundred parameters."""
    for name, count in SIZES.items():
        few_files.setattr(text, name.upper(), count)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "of", "to", "array"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = BertModel(BertConfig(vocab_size=len(words), **sizes), add_pooling_layer=False)
    return {name: text.task(name, fast, encoder) for name in docstrings.RECIPES}


def rows(split: Split) -> set[bytes]:
    first = next(iter(split.inputs.values()))
    return {row.numpy().tobytes() for row in first}


@pytest.mark.parametrize("name", digits.VIEWS)
def test_no_image_is_in_two_splits(images: Suite, name: str) -> None:
    train, val, test = (rows(split) for split in images.tasks[name].splits.values())
    assert not train & val
    assert not train & test
    assert not val & test


@pytest.mark.parametrize("name", docstrings.RECIPES)
def test_no_text_is_in_two_splits(few_files: pytest.MonkeyPatch, name: str) -> None:
    found = docstrings.examples(name)
    seen = [(example.second or example.text)[: docstrings.SAME].lower() for example in found]
    assert len(found) > 50
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", docstrings.RECIPES)
def test_splits_are_parts_of_the_examples(texts: dict[str, Task], name: str) -> None:
    task, found = texts[name], docstrings.examples(name)
    assert {part: len(split) for part, split in task.splits.items()} == SIZES
    labels = torch.cat([task.test.labels, task.val.labels, task.train.labels]).tolist()
    assert [task.classes[label] for label in labels] == [example.label for example in found[: len(labels)]]


def test_too_few_texts_are_refused(texts: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TRAIN", 10_000)
    with pytest.raises(ValueError, match="10056 texts are needed, but there are"):
        text.task("verb", None, None)


def test_a_matching_docstring_is_not_given_away_by_its_library(few_files: pytest.MonkeyPatch) -> None:
    labels = [example.label for example in docstrings.match()]
    assert set(labels) == set(docstrings.MATCHES)
    assert abs(labels.count(docstrings.MATCHES[0]) - labels.count(docstrings.MATCHES[1])) <= 6


def test_an_exception_is_not_named_by_its_message(few_files: pytest.MonkeyPatch) -> None:
    assert not any("Error" in example.text for example in docstrings.exception())


def test_a_section_is_without_its_title_and_marks(few_files: pytest.MonkeyPatch) -> None:
    for example in docstrings.section():
        assert ">>>" not in example.text
        assert example.label.lower() not in example.text.lower()


def test_the_data_are_the_same_whatever_random_numbers_were_drawn_before(images: Suite) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = {name: digits.task(name, task.head).sha256 for name, task in images.tasks.items()}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again == {name: task.sha256 for name, task in images.tasks.items()}
    assert len(set(again.values())) == len(again)


def test_the_texts_are_the_same_in_another_process(few_files: pytest.MonkeyPatch) -> None:
    code = (
        "from tasks import docstrings as d; d.FILES, d.LIBRARIES, d.LEAST = 40, ('numpy', 'sklearn'), 8;"
        "print(repr([d.examples(name)[:20] for name in d.RECIPES]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == repr([docstrings.examples(name)[:20] for name in docstrings.RECIPES])


def test_the_hash_is_of_every_row_and_label(images: Suite) -> None:
    task = images.tasks["rotated"]
    changed = Split(task.test.inputs, task.test.labels.roll(1))
    moved = Split({"pixel_values": task.val.inputs["pixel_values"] + 1e-7}, task.val.labels)
    for other in (task.first(10, 500), Task(task.name, task.classes, task.train, task.val, changed, task.head)):
        assert other.sha256 != task.sha256
    assert Task(task.name, task.classes, task.train, moved, task.test, task.head).sha256 != task.sha256


def test_the_encoder_under_the_frozen_head_is_the_demos_model(images: Suite) -> None:
    part = images.tasks["mirrored"].val
    demo = AutoModelForImageClassification.from_pretrained(images.base).eval()
    model = images.model("mirrored").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**part.inputs)["logits"], demo(**part.inputs).logits)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("encoder.") for name in trained)


def test_a_task_is_read_as_it_was_written(texts: dict[str, Task], tmp_path: Path) -> None:
    for name, task in texts.items():
        save_task(task, tmp_path / name)
        found = load_task(tmp_path / name)
        assert (found.name, found.classes, found.sha256) == (task.name, task.classes, task.sha256)
        assert torch.equal(found.head.weight, task.head.weight)
        assert torch.equal(found.head.bias, task.head.bias)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_probe_decides_as_logistic_regression_does(classes: int) -> None:
    torch.manual_seed(0)
    found = {part: torch.randn(60, 4) for part in ("train", "val")}
    labels = {part: (x.sum(-1) > torch.tensor([[0.0], [1.0]][: classes - 1])).sum(0) for part, x in found.items()}
    head = probe(found, labels)
    fits = [LogisticRegression(C=c, max_iter=2000).fit(found["train"], labels["train"]) for c in (0.01, 0.1, 1, 10)]
    best = max(fits, key=lambda fit: fit.score(found["val"], labels["val"]))
    assert head.weight.shape == (classes, 4)
    assert head(found["val"]).argmax(-1).tolist() == best.predict(found["val"]).tolist()
    probabilities = torch.tensor(best.predict_proba(found["val"]), dtype=torch.float32)
    torch.testing.assert_close(head(found["val"]).softmax(-1), probabilities)


def test_the_mean_is_of_tokens_that_are_not_padding() -> None:
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [100.0], [100.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert text.mean(states, attention_mask=mask).tolist() == [[2.0], [5.0]]


def test_features_are_those_the_head_gets(images: Suite) -> None:
    task, model = images.tasks["negative"], images.model("negative")
    found = features(model, {"val": task.val})["val"]
    assert torch.equal(task.head(found).argmax(-1) == task.val.labels, model.correct(task.val))
    assert isinstance(model, Classifier)


def test_weights_that_are_not_minilms_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="--require-hashes"):
        text.minilm()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"others")
    monkeypatch.setattr(text, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(ValueError, match="must have the sha256 53aa5117"):
        text.minilm()
