"""What every merge method must do, as a class of tests to inherit.

    from hf_modular.testing import MergeCase, MergeContract

    class TestMine(MergeContract):
        cases = (MergeCase(MineConfig(strength=0.3), symmetric=True),)

pytest then runs each point of the contract over the cases. The tensors have no two equal sides, and the models are as
far from each other as fine-tuned ones are from their base.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_modular.checkpoints import Checkpoint, save_checkpoint
from hf_modular.merging import MergeMethod, MergeRecipe, merge, merge_state_dicts
from hf_modular.merging._method import Stack
from hf_modular.merging.engine._pieces import Piece, PieceStacks
from hf_modular.merging.engine._rounding import rounded
from hf_modular.merging.engine._workers import Workers
from hf_modular.merging.runs._memory import InMemory, Merged, engine_of

StateDict = dict[str, Tensor]

SHAPES = {
    "embed": (23, 10),
    "layers.0.weight": (10, 7),
    "layers.0.bias": (10,),
    "layers.1.weight": (10, 7),
    "layers.1.bias": (10,),
    "kernel": (3, 2, 5),
    "one": (1,),
    "scalar": (),
    "none": (0, 4),
}


@dataclass(frozen=True)
class MergeCase:
    """A method with settings, and what it promises for them.

    Args:
        config (`MergeMethod`):
            The method and its settings.
        weights (`Sequence[float]`, *optional*):
            The weights of the models; 0.5, 0.8, 0.3, ... by default.
        symmetric (`bool`, *optional*):
            Whether the order of the models is irrelevant; not tested by default.
        formula (`Callable[[Tensor, Tensor, Tensor], Tensor]`, *optional*):
            The method's formula in its simplest form, of a whole tensor in fp64: base `(*shape)`, models
            `(n, *shape)`, weights `(n,)`. For methods that draw no numbers.
        models (`int`, defaults to 3):
            How many models are merged.
        seed (`int`, defaults to 0):
            Of the models and the run.
    """

    config: MergeMethod
    weights: Sequence[float] | None = None
    symmetric: bool | None = None
    formula: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    models: int = 3
    seed: int = 0

    @property
    def count(self) -> int:
        low, high = self.config.model_counts
        return int(min(max(self.models, low), high))

    @property
    def model_weights(self) -> list[float]:
        default = [0.5, 0.8, 0.3, 0.7, 0.2] if self.config.takes_weights else [1.0] * self.count
        return [*(self.weights or default)][: self.count]

    def states(self, dtype: torch.dtype = torch.float32) -> tuple[StateDict | None, list[StateDict]]:
        """The base, unless the method uses none, and the models."""
        base = _state(self.seed, dtype)
        models = [_near(base, self.seed + 1 + i) for i in range(self.count)]
        return None if self.config.base_model == "unused" else base, models

    def merged(
        self, base: StateDict | None, models: Sequence[StateDict], weights: Sequence[float] | None = None
    ) -> StateDict:
        return merge_state_dicts(
            base,
            models,
            self.config,
            weights=weights or self.model_weights,
            seed=self.seed,
            companions=self.companions(models),
        )

    def companions(self, models: Sequence[StateDict]) -> dict[str, list[StateDict]]:
        """What the method needs beside the models, made of them: positive and different for each."""
        made = [{name: tensor.float().abs() + 1 for name, tensor in model.items()} for model in models]
        return dict.fromkeys(sorted(self.config.needs), made)

    def to_json(self) -> dict[str, Any]:
        """What another process needs to make the same case."""
        kind = type(self.config)
        settings = {key: value for key, value in self.config.to_dict().items() if key != "merge_method"}
        return {
            "module": kind.__module__,
            "name": kind.__qualname__,
            "settings": settings,
            "weights": self.model_weights,
            "models": self.models,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, case: Mapping[str, Any]) -> "MergeCase":
        kind = getattr(import_module(case["module"]), case["name"])
        return cls(kind(**case["settings"]), case["weights"], models=case["models"], seed=case["seed"])

    def fingerprint(self) -> str:
        """The bits of the merged model as a number."""
        merged = self.merged(*self.states())
        return blake2b(b"".join(_bits(tensor) for _, tensor in sorted(merged.items()))).hexdigest()


class MergeContract:
    """The points that hold for every merge method; inherit it and give `cases`."""

    cases: Sequence[MergeCase] = ()
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test over what its arguments name."""
        exact = [case for case in self.cases if case.formula is not None]
        promising = [case for case in self.cases if case.symmetric is not None]
        over = {"dtype": self.dtypes, "case": self.cases, "exact": exact, "promising": promising}
        for argument, values in over.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values, ids=_id)

    # 1
    def test_equal_models_stay_as_they_are(self, case: MergeCase, dtype: torch.dtype) -> None:
        base = _state(case.seed, dtype)
        models = [dict(base) for _ in range(case.count)]
        assert_close(case.merged(None if case.config.base_model == "unused" else base, models), base)

    # 2
    def test_the_order_of_the_models_is_irrelevant_where_promised(self, promising: MergeCase) -> None:
        base, models = promising.states()
        forth = promising.merged(base, models)
        back = promising.merged(base, models[::-1], weights=promising.model_weights[::-1])
        if promising.symmetric:
            assert_close(back, forth)
        else:
            same = all(torch.allclose(back[name], forth[name]) for name in forth)
            _require(not same, "The order of the models does not matter; then promise it.")

    # 3
    def test_blocks_and_threads_change_no_bit(self, case: MergeCase) -> None:
        expected = case.merged(*case.states())
        for block, workers in ((7, 1), (64, 3)):
            _same(_by_blocks(case, block, workers), expected, f"Blocks of {block} in {workers} threads change bits.")

    def test_the_order_of_tensors_changes_no_bit(self, case: MergeCase) -> None:
        base, models = case.states()
        backwards = [dict(reversed(model.items())) for model in models]
        turned = case.merged(base and dict(reversed(base.items())), backwards)
        _same(turned, case.merged(base, models), "The order of the tensors changes bits.")

    def test_shards_change_no_bit(self, case: MergeCase, tmp_path: Path) -> None:
        base, models = case.states()
        recipe = _saved(case, tmp_path)
        expected = case.merged(base, models)
        for size, workers in (("5GB", 1), (300, 2)):
            out = tmp_path / f"out-{workers}"
            merge(recipe, out, seed=case.seed, workers=workers, max_shard_size=size, progress=False, hashes=False)
            _same(_read(out), expected, "Merging from and to shards changes bits.")

    # 4
    def test_another_process_gives_the_same_bits(self) -> None:
        code = (
            "import json, sys; from hf_modular.testing import MergeCase; "
            "print([MergeCase.from_json(case).fingerprint() for case in json.loads(sys.argv[1])])"
        )
        command = [sys.executable, "-c", code, json.dumps([case.to_json() for case in self.cases])]
        environment = {"PYTHONHASHSEED": "271828", "OMP_NUM_THREADS": "2", "PATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        found = str([case.fingerprint() for case in self.cases])
        _require(done.stdout.strip() == found, f"Another process merges differently. {done.stderr}")

    # 5
    def test_the_result_has_the_bases_names_shapes_and_dtypes(self, case: MergeCase, dtype: torch.dtype) -> None:
        base, models = case.states(dtype)
        mixed = [{name: tensor.float() for name, tensor in model.items()} for model in models[1:]]
        reference = models[0] if base is None else base
        merged = case.merged(base, [models[0], *mixed])
        _require([*merged] == [*reference], "The names differ from the base's, or their order does.")
        for name, tensor in reference.items():
            found = (merged[name].dtype, merged[name].shape)
            _require(found == (tensor.dtype, tensor.shape), f"{name} became {found}")

    def test_the_arithmetic_is_wide_and_rounded_once(self, case: MergeCase) -> None:
        narrow = case.states(torch.bfloat16)
        wider = torch.float64 if case.config.in_fp64 else torch.float32
        wide = case.merged(narrow[0] and _wide(narrow[0], wider), [_wide(model, wider) for model in narrow[1]])
        once = {name: rounded(x, torch.bfloat16) if x.is_floating_point() else x for name, x in wide.items()}
        _same(case.merged(*narrow), once, f"A bfloat16 merge is not the {wider} merge, rounded.")

    # 6
    def test_integers_are_not_touched(self, case: MergeCase) -> None:
        base, models = case.states()
        ids = torch.tensor([3, 1, 4])
        base = base and {**base, "ids": ids}
        merged = case.merged(base, [{**model, "ids": ids} for model in models])
        _require(torch.equal(merged["ids"], ids), "Integers were changed.")

    # 7
    def test_the_inputs_are_not_changed(self, case: MergeCase) -> None:
        base, models = case.states()
        stacked = torch.stack([model["embed"] for model in models])
        weights = torch.tensor(case.model_weights)
        stack = Stack("embed", stacked[0] if base is None else base["embed"], stacked, weights, base is not None)
        before = {"base": stack.base.clone(), "models": stacked.clone(), "weights": weights.clone()}
        case.config.merge(stack, case.config.survey(PieceStacks([Piece("embed", 0, 230)], lambda piece: stack)))
        _same({"base": stack.base, "models": stacked, "weights": weights}, before, "Merging changes its inputs.")

    # 8
    def test_zeros_do_no_harm(self, case: MergeCase) -> None:
        zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        base = None if case.config.base_model == "unused" else zeros
        _same(case.merged(base, [zeros] * case.count), zeros, "Of zeros it makes something.")
        one = _near(zeros, case.seed)
        merged = case.merged(base, [one, *[zeros] * (case.count - 1)])
        _require(all(bool(tensor.isfinite().all()) for tensor in merged.values()), "Of zeros it makes NaN.")

    # 9
    def test_a_wrong_shape_is_named(self, case: MergeCase) -> None:
        base, models = case.states()
        wrong = models[-1] | {"kernel": torch.zeros(3, 2, 6)}
        others = models[:-1]
        if base is None and not others:
            pytest.skip("one model alone has nothing to differ from")
        with pytest.raises(ValueError, match=r"kernel must have the base's shape \(3, 2, 5\), but has \(3, 2, 6\)"):
            case.merged(base, [*others, wrong])

    # 10
    def test_it_is_its_formula(self, exact: MergeCase) -> None:
        base, models = exact.states()
        weights = torch.tensor(exact.model_weights, dtype=torch.float64)
        merged = exact.merged(base, models)
        for name in (name for name in SHAPES if models[0][name].numel()):
            stacked = torch.stack([model[name].double() for model in models])
            start = stacked[0] if base is None else base[name].double()
            expected = exact.formula(start, stacked, weights)  # type: ignore[misc]
            assert_close(merged[name], expected.float())

    # 11
    def test_nan_and_infinity_are_refused(self, case: MergeCase) -> None:
        base, models = case.states()
        for value in (float("nan"), float("inf")):
            spoilt = models[-1]["layers.1.weight"].clone()
            spoilt[3, 2] = value
            with pytest.raises(ValueError, match=r"layers\.1\.weight"):
                case.merged(base, [*models[:-1], models[-1] | {"layers.1.weight": spoilt}])

    # 12
    def test_settings_survive_the_disk(self, case: MergeCase, tmp_path: Path) -> None:
        case.config.save_pretrained(tmp_path)
        _require(type(case.config).from_pretrained(tmp_path) == case.config, "Other settings were read than written.")


def _state(seed: int, dtype: torch.dtype = torch.float32) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def _near(base: StateDict, seed: int) -> StateDict:
    """What fine-tuning might have made of the base: a change of a tenth of its size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    changes = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (tensor.float() + 0.1 * changes[name]).to(tensor.dtype) for name, tensor in base.items()}


def _by_blocks(case: MergeCase, block: int, workers: int) -> StateDict:
    base, models = case.states()
    inputs = [InMemory(f"model {i}", model) for i, model in enumerate(models)]
    reference = inputs[0] if base is None else InMemory("the base", base)
    companions = case.companions(models)
    engine = engine_of(reference, base is not None, inputs, case.config, case.model_weights, case.seed, companions)
    merged = Merged({name: torch.empty_like(tensor) for name, tensor in reference.tensors.items()})
    with Workers(workers) as pool:
        replace(engine, block=block).run(merged, pool, lambda name, size: None)
    return merged.tensors


def _saved(case: MergeCase, folder: Path) -> MergeRecipe:
    """The models of a case on disk, each in shards of another size."""
    base, models = case.states()
    states = {"base": base} if base else {}
    states |= {f"model-{i}": model for i, model in enumerate(models)}
    for i, (name, state) in enumerate(states.items()):
        save_checkpoint(folder / name, state, max_shard_size=200 * (i + 1))
    paths = [folder / name for name in states if name != "base"]
    recipe = MergeRecipe.of(case.config, paths, folder / "base" if base else None, case.model_weights)
    entries = [entry.model_dump(exclude_defaults=True) for entry in recipe.models]
    for kind, made in case.companions(models).items():
        for i, (entry, state) in enumerate(zip(entries, made, strict=True)):
            save_checkpoint(folder / f"{kind}-{i}", state)
            entry[kind] = str(folder / f"{kind}-{i}")
    return MergeRecipe.load(recipe.model_dump(exclude_defaults=True) | {"models": entries})


def _read(folder: Path) -> StateDict:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def _wide(state: StateDict, dtype: torch.dtype) -> StateDict:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _same(found: StateDict, expected: StateDict, message: str) -> None:
    _require(found.keys() == expected.keys(), message)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    _require(not different, f"{message} ({different})")


def _require(law: bool, message: str) -> None:
    if not law:
        pytest.fail(message, pytrace=False)


def _id(value: Any) -> str | None:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return repr(value.config) if isinstance(value, MergeCase) else None
