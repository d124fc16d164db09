"""The contract sees what is wrong: methods that break one promise each fail in the tests that hold it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn

from hf_modular.adapters import Adapter, AdapterConfig, Site, register
from hf_modular.testing import LINEAR_LAYERS, AdapterCase, AdapterContract
from hf_modular.testing._adapters import Trial


@dataclass
class ToyConfig(AdapterConfig):
    r: int = field(default=2)

    type_name: ClassVar[str] = "HFM_TOY"


class Toy(Adapter):
    """Adds a number to every row of the weight; nothing is wrong with it."""

    direct = True

    def __init__(self, config: ToyConfig, site: Site) -> None:
        super().__init__(config, site)
        self.rows, self.columns = site.weight_shape[:2]
        self.value = nn.Parameter(torch.zeros(self.rows))

    def delta(self) -> Tensor:
        return self.value.unsqueeze(1).expand(-1, self.columns)

    def forward(self, x: Tensor, y: Tensor, convolve: Any = None) -> Tensor:
        return y + self.value * x.sum(-1, keepdim=True)


class NotTheIdentity(Toy):
    def __init__(self, config: ToyConfig, site: Site) -> None:
        super().__init__(config, site)
        self.value.data.fill_(1e-3)


class OtherForward(Toy):
    def forward(self, x: Tensor, y: Tensor, convolve: Any = None) -> Tensor:
        return y + 1.001 * self.value * x.sum(-1, keepdim=True)


class OtherGradient(Toy):
    def forward(self, x: Tensor, y: Tensor, convolve: Any = None) -> Tensor:
        return y + self.value * x.detach().sum(-1, keepdim=True)


class DeadParameter(Toy):
    def __init__(self, config: ToyConfig, site: Site) -> None:
        super().__init__(config, site)
        self.unused = nn.Parameter(torch.zeros(self.rows))

    def forward(self, x: Tensor, y: Tensor, convolve: Any = None) -> Tensor:
        return super().forward(x, y) + 0 * self.unused


class NoEffect(Toy):
    def delta(self) -> Tensor:
        return 0 * super().delta()

    def forward(self, x: Tensor, y: Tensor, convolve: Any = None) -> Tensor:
        return y


class WritesIntoTheBase(Toy):
    direct = False

    def transform(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.detach().add_(1) + super().delta(), bias

    delta = Adapter.delta


class Forgets(Toy):
    """Draws at random what it should save."""

    def __init__(self, config: ToyConfig, site: Site) -> None:
        super().__init__(config, site)
        self.signs = torch.randn(self.rows).sign()

    def delta(self) -> Tensor:
        return super().delta() * self.signs.unsqueeze(1)

    def forward(self, x: Tensor, y: Tensor, convolve: Any = None) -> Tensor:
        return y + self.signs * self.value * x.sum(-1, keepdim=True)


class MixesTheBatch(Toy):
    def forward(self, x: Tensor, y: Tensor, convolve: Any = None) -> Tensor:
        return y + self.value * (x.sum(-1, keepdim=True) + x.mean())


class SharesWithTheWrongOnes(Toy):
    """Keeps what is shared on the class, so that a second adapter changes the first."""

    store: ClassVar[dict[tuple[Any, ...], nn.Parameter]] = {}

    def __init__(self, config: ToyConfig, site: Site) -> None:
        super().__init__(config, site)
        self.value = self.store.setdefault((site, torch.initial_seed()), self.value)


# what is broken -> the tests of the contract that must fail
BROKEN: dict[type[Toy], list[str]] = {
    NotTheIdentity: ["test_starts_as_the_base_model_where_it_promises_so"],
    OtherForward: [
        "test_the_merged_model_equals_the_adapted_one",
        "test_merge_and_unload_gives_the_original_classes_and_keys",
        "test_a_cheap_forward_equals_the_rewritten_layer",
    ],
    OtherGradient: ["test_a_cheap_forward_equals_the_rewritten_layer"],
    DeadParameter: [
        "test_the_adapters_and_nothing_else_have_gradients",
        "test_the_trainable_parameters_are_as_many_as_the_formula_says",
    ],
    NoEffect: [
        "test_every_layer_changes_once_its_parameters_move",
        "test_unmerging_restores_every_bit",
    ],
    WritesIntoTheBase: [
        "test_starts_as_the_base_model_where_it_promises_so",
        "test_disabled_adapters_leave_the_base_model",
    ],
    Forgets: [
        "test_a_saved_adapter_loads_under_another_seed_and_name",
        "test_a_loaded_adapter_joins_another_one",
    ],
    MixesTheBatch: ["test_a_mixed_batch_equals_each_sample_alone"],
    SharesWithTheWrongOnes: ["test_the_trainable_parameters_are_as_many_as_the_formula_says"],
}


@pytest.fixture
def contract() -> Iterator[Callable[..., None]]:
    """Run one test of the contract on a method that is registered for the time of the test."""

    def run(adapter: type[Toy], test: str, tmp_path: Path) -> None:
        register(ToyConfig, adapter)
        case = AdapterCase(ToyConfig, {}, lambda sites: sum(s.weight_shape[0] for s in sites), LINEAR_LAYERS)
        trial = Trial(case, "Linear")
        given = {
            "trial": trial,
            "mergeable": trial,
            "dtype": torch.float32,
            "count": 2,
            "low_cpu_mem_usage": False,
            "tmp_path": tmp_path,
        }
        method = getattr(AdapterContract, test)
        names = method.__code__.co_varnames[1 : method.__code__.co_argcount]
        method(AdapterContract(), **{name: given[name] for name in names})

    yield run
    member = PeftType("HFM_TOY")
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member)


@pytest.mark.parametrize(
    ("broken", "test"),
    [(broken, test) for broken, tests in BROKEN.items() for test in tests],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_method_fails(contract: Callable[..., None], broken: type[Toy], test: str, tmp_path: Path) -> None:
    contract(Toy, test, tmp_path / "fine")
    with pytest.raises(AssertionError):
        contract(broken, test, tmp_path / "broken")
