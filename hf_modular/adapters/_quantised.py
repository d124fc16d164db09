"""What quantised base layers need beside PEFT's backends: bitsandbytes changes its weights behind everybody's back."""

from copy import copy
from dataclasses import dataclass
from typing import Any

from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

_STATE = ("CB", "SB", "SCB", "SBt", "CBt")  # of an 8-bit layer, beside the parameter itself


def dequantised(layer: nn.Module, backend: QuantizationBackend) -> Tensor:
    """The weight of a quantised layer, also after bitsandbytes has packed it for inference on this CPU."""
    weight: Any = getattr(layer, "weight", None)  # which not every backend has
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return _from_packed(weight)
    return backend.get_base_weight(layer)


def _from_packed(weight: Any) -> Tensor:
    """On a CPU with bf16 instructions the first call without gradients reorders a 4-bit weight in place.

    PEFT 0.21 dequantises it as if it had not, and what bitsandbytes 0.50 makes of the scales on the way back is in
    the wrong order or quantised once more. So the scales are put in order here.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    state = copy(weight.quant_state)
    state.original_nested = False
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return dequantize_4bit(data, state)


@dataclass(frozen=True)
class Taken:
    """A layer with the parameters that it has now, to be put back later."""

    layer: nn.Module
    parameters: dict[str, nn.Parameter | None]
    attributes: dict[str, dict[str, Any]]  # of the parameters; PEFT marks a 4-bit one as not quantised when it merges
    state: dict[str, Any]

    @classmethod
    def of(cls, layer: nn.Module) -> "Taken":
        state = getattr(layer, "state", None)
        parameters = dict(layer._parameters)
        attributes = {name: dict(vars(p)) for name, p in parameters.items() if p is not None}
        return cls(layer, parameters, attributes, {key: getattr(state, key) for key in _STATE if hasattr(state, key)})

    def put_back(self) -> nn.Module:
        self.layer._parameters.update(self.parameters)
        for name, attributes in self.attributes.items():
            vars(self.parameters[name]).update(attributes)
        for key, value in self.state.items():
            setattr(self.layer.state, key, value)
        return self.layer
