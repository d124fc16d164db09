"""What each of several adapters has trained whole, such as the head of its task, kept apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_modular.adapter_merging._source import Base, Source
from hf_modular.adapters._method import Site


@dataclass(frozen=True, eq=False)
class Head:
    """A layer that the adapters have trained whole: for each its weight (out, in, *kernel), and its bias."""

    weights: list[Tensor]
    biases: list[Tensor]

    @property
    def rows(self) -> list[int]:
        return [len(weight) for weight in self.weights]

    def tensors(self) -> dict[str, Tensor]:
        """By the ends of their names."""
        named = {"weights": self.weights, "biases": self.biases}
        return {f"{kind}.{i}": tensor for kind, tensors in named.items() for i, tensor in enumerate(tensors)}


def heads_of(sources: Sequence[Source], base: Base, sites: Mapping[str, Site]) -> dict[str, Head]:
    """The layers that any of the adapters has trained whole; where one has not, it is the base model's."""
    names = dict.fromkeys(name.replace(".base_layer", "") for source in sources for name in trained_whole(source))
    if odd := [name for name in names if name.rpartition(".")[2] not in ("weight", "bias")]:
        raise ValueError(f"Layers with a weight and a bias can be kept whole, but the adapters have {odd}.")
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
    if both := [layer for layer in layers if layer in sites]:
        raise ValueError(
            f"A layer can be kept whole or as what an adapter adds to it, but the adapters have both of {both}. "
            "Merge them into the weights of the model, and reduce those."
        )
    return {layer: _head(sources, base, layer) for layer in layers}


def trained_whole(source: Source) -> list[str]:
    """The names of what an adapter has trained whole: not the embeddings that PEFT saves with adapters on them."""
    return [name for name in source.whole if not name.endswith(".base_layer.weight")]


def whole_of(source: Source, base: Base, layer: str) -> tuple[Tensor, Tensor | None]:
    """The weight (out, in, *kernel) and the bias of a layer: an adapter's, or else the base model's."""
    weight, bias = (source.whole.get(f"{layer}.{part}") for part in ("weight", "bias"))
    if weight is None:
        own = base.layer(layer)
        return own[0], own[1] if bias is None else bias
    return base.arranged(layer, weight), bias


def _head(sources: Sequence[Source], base: Base, layer: str) -> Head:
    each = [whole_of(source, base, layer) for source in sources]
    biases = [bias for _, bias in each if bias is not None]
    if biases and len(biases) < len(each):
        raise ValueError(f"All or none of the adapters must have a bias of '{layer}', but {len(biases)} have one.")
    return Head([weight for weight, _ in each], biases)
