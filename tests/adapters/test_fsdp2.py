"""Under FSDP 2: weights are whole where the adapters read them, and gradients are those of one process."""

from collections.abc import Iterator

import pytest
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from adapters import tiny
from adapters.conftest import adapted
from adapters.table import METHODS
from hf_modular.testing import AdapterCase


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def step(model: nn.Module) -> dict[str, Tensor]:
    loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return {"loss": loss.detach(), **whole}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", METHODS, ids=str)
def test_a_step_is_that_of_one_process(case: AdapterCase) -> None:
    names = ["q_proj", "down_proj"]
    expected = step(adapted(case, "llama", target_modules=names))
    model = adapted(case, "llama", target_modules=names)
    # what the layers share belongs to no block of its own, and FSDP 2 refuses that: then the model is one group
    shares = any(name.endswith(".shared") for name, _ in model.named_modules())
    for block in [] if shares else model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    found = step(model)
    assert_close(found, expected, rtol=1e-5, atol=1e-7)
