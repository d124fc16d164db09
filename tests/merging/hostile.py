"""Thousands of damaged inputs of merges: run as a script, it says which of them end otherwise than in our own errors.

    python tests/merging/hostile.py FOLDER [COUNT [FIRST]]

Each case has a few seconds, and all of them together a gigabyte beyond what the libraries take when they are loaded.
"""

import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_modular.checkpoints import Checkpoint
from hf_modular.merging import MergeRecipe, merge

SECONDS = 5  # of the processor
WAITING = 60  # seconds on the clock of a machine that others use, too
MEMORY = 1 << 30
OURS = (ValueError, FileNotFoundError)  # what merge says it raises; a UnicodeDecodeError or such is one by accident
ACCIDENTS = (UnicodeError, json.JSONDecodeError, RecursionError)
VALUES = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, 1e308, float("inf"), float("nan"), "", "x" * 5000, "../..",
    "/etc/passwd", "/dev/zero", "\0", "a\nb", "\ud800", [], [[]], [0, 10**9], {}, {"": {}}, "9" * 5000,
    json.loads("[" * 60 + "]" * 60), "F32", "BF16", "model-00001-of-00002.safetensors", "linear", "slerp", "union",
]  # fmt: skip


class TooLong(BaseException):
    """A case took too long."""


class Mutator:
    """Damages data and texts, the same way for the same seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def data(self, data):
        data = copy.deepcopy(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            places = [*_places(data)]
            if places:
                self._change(*self.random.choice(places))
        return data

    def text(self, text):
        for _ in range(self.random.choice((1, 1, 2, 5))):
            start, end = sorted(self.random.randrange(len(text) + 1) for _ in range(2))
            end = min(end, start + self.random.choice((1, 4, 40)))
            part = text[start:end]
            new = self.random.choice(
                (b"", part * 2, self._bytes(), part[::-1], b"{", b"[" * 9, b'"', b": &a *a\n", b"\n")
            )
            text = text[:start] + new + text[end:]
        return text[: self.random.randrange(len(text) + 1)] if self.random.random() < 0.2 else text

    def _bytes(self):
        return bytes(self.random.randrange(256) for _ in range(self.random.choice((1, 2, 8))))

    def _change(self, holder, key):
        action = self.random.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[str(self.random.choice(VALUES))[:99]] = holder[key]
        elif action == 2:
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(self.random.choice(VALUES))


def _places(data):
    if isinstance(data, (dict, list)):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield data, key
            yield from _places(data[key])


class Inputs:
    """Good models and recipes, and what is done to copies of them."""

    def __init__(self, folder):
        self.folder = folder
        words = {word: i for i, word in enumerate(["<unk>", *"abcdefg"])}
        config = LlamaConfig(
            vocab_size=10, hidden_size=4, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        for i, name in enumerate(("one", "two")):
            torch.manual_seed(i)
            LlamaForCausalLM(config).save_pretrained(folder / name, max_shard_size="2KB" if i else "5GB")
            tokenizer = Tokenizer(models.BPE(words | ({"h": 8, "ab": 9} if i else {}), [("a", "b")] if i else []))
            PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / name)
        self.bad = folder / "bad"
        self.recipes = [yaml.safe_dump(recipe).encode() for recipe in self._recipes()]
        self.files = {path.name: path.read_bytes() for path in (folder / "two").iterdir()}

    def _recipes(self):
        one, two = str(self.folder / "one"), str(self.bad)
        pair = [{"model": one, "parameters": {"weight": [0.1, 0.9]}}, {"model": two}]
        ranges = [{"model": model, "layer_range": [0, 2]} for model in (one, two)]
        tokens = {"h": {"source": two}, "x": {"source": {"kind": "zero"}, "force": True}}
        yield {"merge_method": "linear", "models": pair, "dtype": "float16", "parameters": {"normalize": True}}
        yield {
            "merge_method": "ties", "base_model": one, "models": [{"model": two}],
            "parameters": {"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]},
        }  # fmt: skip
        yield {"merge_method": "slerp", "base_model": one, "slices": [{"sources": ranges}], "parameters": {"t": 0.5}}
        yield {"merge_method": "passthrough", "slices": [{"sources": ranges[:1]}, {"sources": ranges[1:]}]}
        yield {
            "merge_method": "linear", "models": pair, "heads": "base", "chat_template": "chatml",
            "tokenizer": {"source": "union", "tokens": tokens, "pad_to_multiple_of": 8},
        }  # fmt: skip

    def restore(self):
        shutil.rmtree(self.bad, ignore_errors=True)
        self.bad.mkdir()
        for name, content in self.files.items():
            (self.bad / name).write_bytes(content)

    # ---- what is damaged

    def header(self, mutator):
        """The header or the length of a file of weights, by its meaning or its bytes."""
        self._damage_header(mutator.random.choice(sorted(self.bad.glob("*.safetensors"))), mutator)
        with Checkpoint(self.bad) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)

    def _damage_header(self, path, mutator):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, body = content[8 : 8 + length], content[8 + length :]
        way = mutator.random.randrange(4)
        if way < 2:
            header = _json(mutator.data(json.loads(header)))
        elif way == 2:
            header = mutator.text(header)
        size = mutator.random.choice((len(header),) * 9 + (0, length, 2**63, 2**64 - 1, len(content), 1 << 27))
        path.write_bytes(size.to_bytes(8, "little") + header + (mutator.text(body) if way == 3 else body))

    def shapes(self, mutator):
        """Tensors of other names and shapes that are stored as they should be, in a merge."""
        [path] = self.one_file
        tensors = load_file(path)
        for _ in range(mutator.random.choice((1, 1, 3))):
            name = mutator.random.choice(sorted(tensors))
            tensor = tensors.pop(name)
            new = mutator.random.choice(
                (name, name, mutator.text(name.encode()).decode("utf-8", "ignore"), "9" * 5000)
            )
            shape = mutator.random.choice(
                ((), (0,), (2**40, 0), (0, 2**40), (1,) * 60, (16,), tuple(tensor.shape), (12, 4), (3, 3))
            )
            kind = mutator.random.choice((torch.float32, torch.float32, torch.bfloat16, torch.int8, torch.bool))
            tensors[new] = torch.ones(shape, dtype=kind)
        for old in self.bad.glob("model*"):
            old.unlink()
        save_file(tensors, self.bad / "model.safetensors")
        self._merge(self._another(mutator))

    @property
    def one_file(self):
        return (self.folder / "one").glob("*.safetensors")

    def _another(self, mutator):
        """One of the recipes, perhaps with other values for vocabularies."""
        recipe = yaml.safe_load(mutator.random.choice(self.recipes))
        if "tokenizer" in recipe and mutator.random.random() < 0.5:
            recipe["tokenizer"] = {"pad_to_multiple_of": mutator.random.choice((1, 7, 2**20, 2**40, 2**62))}
        elif mutator.random.random() < 0.3:
            rest = {key: value for key, value in recipe.items() if key != "tokenizer"}
            return rest | {"vocab": mutator.random.choice(("pad", "truncate"))}
        return recipe

    def index(self, mutator):
        """The list of which tensor is in which file."""
        path = self.bad / "model.safetensors.index.json"
        self._damage(path, mutator)
        Checkpoint(self.bad).close()

    def recipe(self, mutator):
        """A recipe, by its meaning or its text."""
        text = mutator.random.choice(self.recipes)
        path = self.folder / "recipe.yaml"
        by_meaning = mutator.random.random() < 0.5
        path.write_bytes(
            yaml.safe_dump(mutator.data(yaml.safe_load(text))).encode("utf-8", "surrogatepass")
            if by_meaning
            else mutator.text(text)
        )
        MergeRecipe.load(path)

    def settings(self, mutator):
        """A config or a tokenizer, in a merge that needs them."""
        name = mutator.random.choice(("config.json", "config.json", "tokenizer.json", "tokenizer_config.json"))
        self._damage(self.bad / name, mutator)
        self._merge(yaml.safe_load(mutator.random.choice(self.recipes[2:])))

    def whole(self, mutator):
        """Whatever there is, in a merge."""
        self._damage(self.bad / mutator.random.choice(sorted(self.files)), mutator)
        self._merge(yaml.safe_load(mutator.random.choice(self.recipes)))

    def links(self, mutator):
        """A file that is a link, a folder or a pipe."""
        name = mutator.random.choice(sorted(self.files))
        target = self.bad / name
        target.unlink()
        outside = self.folder / "outside"
        outside.mkdir(exist_ok=True)
        (outside / name).write_bytes(self.files[name].replace(b"{", b'{"outside": 1, ', 1))
        kind = mutator.random.randrange(4)
        if kind == 0:
            target.mkdir()
        elif kind == 1:
            os.mkfifo(target)
        else:
            to = ("/dev/zero", "/dev/null", "/proc/self/environ", "/", target, self.bad / ".." / "outside" / name)
            target.symlink_to(mutator.random.choice(to))
        models = [{"model": str(self.bad)}, {"model": str(self.folder / "one")}]
        out = self._merge({"merge_method": "linear", "models": models})
        if any(b'"outside"' in path.read_bytes() for path in out.iterdir()):
            raise AssertionError(f"{name} came from outside")

    def _damage(self, path, mutator):
        if path.suffix == ".json" and mutator.random.random() < 0.7:
            path.write_bytes(_json(mutator.data(json.loads(path.read_bytes()))))
        else:
            path.write_bytes(mutator.text(path.read_bytes()))

    def _merge(self, recipe):
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            merge(recipe, out, workers=1, progress=False, hashes=False)
        except BaseException:
            if out.exists():
                raise AssertionError(f"left behind: {sorted(path.name for path in out.iterdir())}") from None
            raise
        return out


SHARES = {"header": 40, "index": 20, "recipe": 40, "settings": 3, "whole": 2, "links": 2, "shapes": 2}


def run(inputs, kind, seed):
    """How a case ends, and how long it takes."""
    inputs.restore()
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        getattr(inputs, kind)(Mutator(seed))
        end = "fine"
    except OURS as error:
        end = type(error).__name__ if isinstance(error, ACCIDENTS) else "refused"
        if not str(error):
            end = "refused without a word"
    except (Exception, TooLong) as error:
        end = "".join(traceback.format_exception(error)[-4:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return end, time.process_time() - started


def _json(data):
    return json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _too_long(*_):
    raise TooLong


def main():
    folder, count, first = Path(sys.argv[1]), *map(int, [*sys.argv[2:], *("2000", "0")[len(sys.argv) - 2 :]])
    warnings.simplefilter("ignore")
    inputs = Inputs(folder)
    inputs.restore()
    for recipe in inputs.recipes:  # good ones, which also load all that is loaded when it is needed
        inputs._merge(yaml.safe_load(recipe))
    for timer in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(timer, _too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    ends, times = Counter(), Counter()
    for seed in range(first, first + count):
        kind = random.Random(seed).choices([*SHARES], [*SHARES.values()])[0]
        end, seconds = run(inputs, kind, seed)
        times[kind] += seconds
        ends[kind, end if end in ("fine", "refused") else "other"] += 1
        if end not in ("fine", "refused"):
            sys.stdout.write(f"case {seed} ({kind}): {end}\n")
    found = {" ".join(key): n for key, n in sorted(ends.items())}
    spent = {kind: round(seconds, 1) for kind, seconds in times.items()}
    sys.stdout.write(json.dumps({"cases": count, "ends": found, "seconds": spent}) + "\n")


if __name__ == "__main__":
    main()
