"""What a survey sees, for tests of methods without an engine."""

from dataclasses import dataclass, replace

import torch

from hf_modular.merging._method import Stack


@dataclass
class Chunks:
    """A stack in chunks of `size` elements, whole if that is None; the first `sampled` of them serve for guesses."""

    stack: Stack
    size: int | None = None
    sampled: int | None = None
    passes: int = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.parts)

    def map(self, function):
        return map(function, self)

    def sample(self, of_each=None):
        return self.parts[: self.sampled]

    @property
    def parts(self):
        if self.size is None:
            return [self.stack]
        return [self._part(start) for start in range(0, self.stack.base.numel(), self.size)]

    def _part(self, start):
        where = slice(start, start + self.size)
        base, models = self.stack.base.flatten()[where], self.stack.models.flatten(1)[:, where]
        return replace(self.stack, base=base, models=models, offset=self.stack.offset + start)


def merged(config, stack, size=None):
    """The stack merged, in chunks if the method allows it."""
    chunks = Chunks(stack, size if config.elementwise else None)
    survey = config.survey(chunks)
    return torch.cat([config.merge(part, survey).flatten() for part in chunks]).view(stack.base.shape)


def stack_of(base, *models, weights=None, **more):
    """Tensors as a stack of a tensor called "w"."""
    dtype = torch.float32 if not isinstance(base, torch.Tensor) else base.dtype
    base, *models = (torch.as_tensor(x, dtype=dtype) for x in (base, *models))
    weights = torch.tensor([1.0] * len(models) if weights is None else weights)
    return Stack("w", base, torch.stack(models), weights, **more)
