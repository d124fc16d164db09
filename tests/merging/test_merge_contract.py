"""Every merge method against the contract: those of the table by themselves, other settings as further lines."""

import torch

from hf_modular.merging import (
    METHODS,
    BreadcrumbsConfig,
    DAREConfig,
    DELLAConfig,
    FisherConfig,
    GraftConfig,
    KarcherConfig,
    LinearConfig,
    ModelStockConfig,
    MultiSLERPConfig,
    NearSwapConfig,
    NuSLERPConfig,
    OPCMConfig,
    PassthroughConfig,
    PCBConfig,
    RWSConfig,
    SCEConfig,
    SLERPConfig,
    SSDConfig,
    TaskArithmeticConfig,
    TIESConfig,
)
from hf_modular.testing import MergeCase, MergeContract


def mean(base, models, weights):
    return torch.einsum("n,n...->...", weights, models) / weights.sum()


def arithmetic(scale=1.0):
    return lambda base, models, weights: base + scale * torch.einsum("n,n...->...", weights, models - base)


def by_importance(base, models, weights):
    """Fisher merging, where the companion of a model is |W| + 1."""
    shares = torch.einsum("n,n...->n...", weights, models.abs() + 1)
    return (shares * models).sum(0) / shares.sum(0)


CASES = (
    MergeCase(LinearConfig(), symmetric=True, formula=mean),
    MergeCase(TaskArithmeticConfig(), symmetric=True, formula=arithmetic()),
    MergeCase(TaskArithmeticConfig(scale=-0.7), weights=(0.2, -0.5, 1.1), symmetric=True, formula=arithmetic(-0.7)),
    MergeCase(DAREConfig(drop=0.0), symmetric=True, formula=arithmetic()),
    MergeCase(DAREConfig(drop=0.6, scale=0.8), symmetric=False),
    MergeCase(DAREConfig(drop=0.6, rescale="norm"), seed=2),
    MergeCase(DAREConfig(drop=0.3, election="symmetric", normalize=True), seed=3, symmetric=False),
    MergeCase(DAREConfig(drop=0.6, rescale="q", q=0.7), seed=4),
    MergeCase(DAREConfig(drop=0.6, rescale="q", q="closed_form"), seed=4),
    MergeCase(DAREConfig(drop=0.4, mask="columns", rescale="norm"), seed=5),
    MergeCase(DAREConfig(drop=0.6, mask="magnitude", rescale="none"), symmetric=True),
    MergeCase(DAREConfig(drop=0.6, mask="wanda", rescale="q", q=0.5, election="symmetric"), symmetric=True),
    MergeCase(PCBConfig(density=0.4, drop=0.5), seed=2),
    MergeCase(TIESConfig(density=0.4, scale=0.8), symmetric=True),
    MergeCase(TIESConfig(density=0.7, rescale="norm", election="mergekit"), weights=(0.3, -0.9, 1.2)),
    MergeCase(TIESConfig(density=1.0, election="none", normalize=False), symmetric=True, formula=arithmetic()),
    MergeCase(BreadcrumbsConfig(density=0.6, gamma=0.1, rescale="inverse"), symmetric=True),
    MergeCase(DELLAConfig(density=0.6, epsilon=0.2), symmetric=False),
    MergeCase(DELLAConfig(density=0.4, rescale="norm", election="none", normalize=False)),
    MergeCase(SCEConfig(select_topk=0.5), symmetric=True),
    MergeCase(SLERPConfig(t=0.3), models=1),
    MergeCase(NuSLERPConfig(), symmetric=True),
    MergeCase(NuSLERPConfig(flatten=False), symmetric=True),
    MergeCase(NuSLERPConfig(flatten=False, row_wise=True), symmetric=True),
    MergeCase(MultiSLERPConfig(normalize_weights=False), symmetric=True),
    MergeCase(KarcherConfig(), symmetric=True),
    MergeCase(ModelStockConfig(), symmetric=True),
    MergeCase(ModelStockConfig(filter_wise=True, extrapolate=True), symmetric=True),
    MergeCase(NearSwapConfig(t=0.05), formula=lambda base, models, _: base + (models[0] - base).clamp(-0.05, 0.05)),
    MergeCase(FisherConfig(), symmetric=True),
    MergeCase(FisherConfig(normalize=False, floor=0.5), symmetric=True, formula=by_importance),
    MergeCase(FisherConfig(floor=1.5), symmetric=False),
    MergeCase(PCBConfig(density=0.4), symmetric=True),
    MergeCase(OPCMConfig(), symmetric=False),
    MergeCase(OPCMConfig(alpha=1.0, skip="layers.0"), symmetric=False),
    MergeCase(PCBConfig(density=0.4, variant="raw", scope="tensor", scale=0.5), symmetric=True),
    MergeCase(GraftConfig(density=0.3), symmetric=True),
    MergeCase(GraftConfig(density=1.0), symmetric=True, formula=arithmetic()),
    MergeCase(RWSConfig(scale=0.7), symmetric=False),
    MergeCase(RWSConfig(target="last", include="layers", average="bias")),
    MergeCase(SSDConfig(), formula=lambda base, models, weights: models[0]),
    MergeCase(PassthroughConfig(), formula=lambda base, models, weights: models[0]),
)
held = {type(case.config) for case in CASES}
OTHERS = tuple(MergeCase(method()) for method in METHODS.values() if method not in held)


class TestContract(MergeContract):
    cases = (*CASES, *OTHERS)
