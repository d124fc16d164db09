"""Checkpoints that bitsandbytes has quantised, read as the numbers that their codes stand for.

4 bits: W = quant_map[code] · absmax[block], two codes to a byte, the first in the high half; the absmax may be coded
themselves, in 8 bits. 8 bits: W = code · SCB[row] / 127. The numbers are those that a quantised model computes with,
before they are rounded to the dtype of its activations.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_modular.checkpoints import Checkpoint, StoredTensor
from hf_modular.merging.sources._computed import ComputedCheckpoint, Group

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BYTE = 127.0  # what an int8 code of the largest number of a row is


def quantisation(config: Mapping[str, Any]) -> str | None:
    """How a model is quantised, by its config; None if it is not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", found)) if isinstance(found, dict) else str(found)


def dequantised(weights: Checkpoint, config: Mapping[str, Any], label: str) -> ComputedCheckpoint:
    """The checkpoint of a model that bitsandbytes has quantised, as full numbers."""
    if (method := quantisation(config)) != "bitsandbytes":
        raise ValueError(
            f"{label} is quantised by {method}, and only bitsandbytes' 4 and 8 bits can be dequantised here"
        )
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    tensors, groups = dict(weights.tensors), {}
    for name in weights.tensors:
        if _STATE in name:
            weight = name.partition(_STATE)[0]
            tensors[weight], compute, parts = _four_bits(weights, weight, name)
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('SCB')}weight"
            tensors[weight], compute, parts = _eight_bits(weights, weight, dtype)
        else:
            continue
        groups[weight] = (weight, compute)
        for part in parts:
            tensors.pop(part, None)
    return ComputedCheckpoint(weights.path, weights.files, tensors, groups)


def _four_bits(weights: Checkpoint, weight: str, state: str) -> tuple[StoredTensor, Group, list[str]]:
    settings = json.loads(bytes(weights.read(state).tolist()))
    shape, stored = tuple(settings["shape"]), weights.tensors[weight]
    info = StoredTensor(getattr(torch, settings["dtype"]), shape, stored.file, stored.start)
    if stored.numel != math.ceil(info.numel / 2):
        raise ValueError(
            f"{weight} must have two codes in each byte for the shape {shape}, but has {stored.numel} bytes"
        )
    parts = {part: f"{weight}.{part}" for part in _PARTS if f"{weight}.{part}" in weights.tensors}

    def compute() -> dict[str, Tensor]:
        held = {part: weights.read(name) for part, name in parts.items()}
        codes = weights.read(weight).reshape(-1)
        codes = torch.stack([codes >> 4, codes & 15], 1).reshape(-1)[: info.numel]
        scale = _absmax(held, settings).repeat_interleave(settings["blocksize"])[: info.numel]
        return {weight: held["quant_map"].float()[codes.int()].mul_(scale).view(shape)}

    return info, compute, [state, *parts.values()]


def _absmax(held: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """The largest absolute value of each block."""
    absmax = held["absmax"]
    if "nested_absmax" not in held:
        return absmax.float()
    scale = held["nested_absmax"].float().repeat_interleave(settings["nested_blocksize"])[: absmax.numel()]
    return held["nested_quant_map"].float()[absmax.int()].mul_(scale).add_(settings["nested_offset"])


def _eight_bits(weights: Checkpoint, weight: str, dtype: torch.dtype) -> tuple[StoredTensor, Group, list[str]]:
    stored, scale = weights.tensors[weight], f"{weight.removesuffix('weight')}SCB"
    info = StoredTensor(dtype, stored.shape, stored.file, stored.start)

    def compute() -> dict[str, Tensor]:
        return {weight: weights.read(weight).float().mul_(weights.read(scale).float()[:, None] / _BYTE)}

    return info, compute, [scale, f"{weight}_format"]
