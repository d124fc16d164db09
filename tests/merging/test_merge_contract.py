"""Every merge method against the contract: those of the table by themselves, other settings as further lines."""

import torch

from hf_modular.merging import METHODS, DAREConfig, LinearConfig, TaskArithmeticConfig
from hf_modular.testing import MergeCase, MergeContract


def mean(base, models, weights):
    return torch.einsum("n,n...->...", weights, models) / weights.sum()


def arithmetic(scale=1.0):
    return lambda base, models, weights: base + scale * torch.einsum("n,n...->...", weights, models - base)


CASES = (
    MergeCase(LinearConfig(), symmetric=True, formula=mean),
    MergeCase(TaskArithmeticConfig(), symmetric=True, formula=arithmetic()),
    MergeCase(TaskArithmeticConfig(scale=-0.7), weights=(0.2, -0.5, 1.1), symmetric=True, formula=arithmetic(-0.7)),
    MergeCase(DAREConfig(drop=0.0), symmetric=True, formula=arithmetic()),
    MergeCase(DAREConfig(drop=0.6, scale=0.8), symmetric=False),
    MergeCase(DAREConfig(drop=0.6, rescale="norm"), seed=2),
)
held = {type(case.config) for case in CASES}
OTHERS = tuple(MergeCase(method()) for method in METHODS.values() if method not in held)


class TestContract(MergeContract):
    cases = (*CASES, *OTHERS)
