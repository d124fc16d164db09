"""AdamR: Adam that pulls the weights towards where they were before fine-tuning (Deng et al., arXiv 2410.09344).

    m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²,   m̂ = m/(1 - β₁ᵗ),   v̂ = v/(1 - β₂ᵗ)
    v̄ = √(mean of v̂ over all parameters),   c = lr · pull / v̄
    W ← W - c (W - W₀) - lr m̂/(√v̂ + ε)                                "l2"
    W ← W - sign(W - W₀) min(c, |W - W₀|) - lr m̂/(√v̂ + ε)              "l1"

It keeps task vectors small, which DARE and other ways to thin them need (DAREx-L2). As in decoupled weight decay the
pull is no part of the gradient; it is divided by v̄ so that it does not depend on the scale of the loss, as in "stable"
weight decay. With `normalize=False` v̄ is 1; then pull towards 0 is AdamW's weight decay.

The formula is that of the authors' code. Ours: c is at most 1 with "l2", and "l1" stops at W₀, so that neither goes
beyond it; c is 0 as long as all gradients are; `normalize`; and what W₀ is for adapters (see `AdamR.for_model`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Elements that are updated at a time: what is computed on the way takes a few times their memory. On a CPU it fits the
# cache; on an accelerator it is enough to keep it busy.
_BUCKETS = {"cpu": 1 << 17}
_BUCKET = 1 << 24

Anchor = Tensor | float | None  # W₀ of a parameter; None: it is not pulled


class AdamR(Optimizer):
    """Adam with a decoupled pull towards the weights before fine-tuning (arXiv 2410.09344).

    Give it to `Trainer(optimizers=(AdamR.for_model(model, lr=2e-5), None))`. The weights before fine-tuning stay in
    the memory of the CPU, and go to an accelerator a part at a time; those that are all the same are kept as a number.

    Args:
        params:
            Parameters or groups of them. A group may have settings of its own, among them an `anchor`: what its
            parameters are pulled to.
        lr (`float`, defaults to 0.001):
            The learning rate.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.999)`):
            How slowly the means of the gradients and of their squares change.
        eps (`float`, defaults to 1e-8):
            Added to the root of the squares' mean.
        pull (`float`, defaults to 1e-4):
            How strongly the weights are pulled.
        norm (`str`, defaults to `"l2"`):
            `"l2"` shrinks all differences by the same share, `"l1"` by the same amount, which makes many of them 0.
        normalize (`bool`, defaults to `True`):
            Divide the pull by the root mean square of all gradients, so that it does not depend on their scale.
        anchor (`str | float | list[Tensor] | None`, defaults to `"start"`):
            What to pull to: `"start"` is what the parameters are now, a number is the same for all, tensors are used
            as and where they are and have to stay so, and `None` is no pull.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        pull: float = 1e-4,
        norm: Literal["l2", "l1"] = "l2",
        normalize: bool = True,
        anchor: Literal["start"] | float | list[Tensor] | None = "start",
    ) -> None:
        self._anchors: dict[Tensor, Anchor] = {}
        settings = {"lr": lr, "betas": betas, "eps": eps, "pull": pull, "norm": norm, "normalize": normalize}
        super().__init__(params, settings | {"anchor": anchor})

    @classmethod
    def for_model(cls, model: nn.Module, *, free: str | None = None, **settings: Any) -> Self:
        """An optimizer of what the model trains, with the right anchor for each of its parameters.

        Weights of the model are pulled to what they are now, and copies of them (PEFT's `modules_to_save`) to the
        originals in the model, of which no further copy is made. An adapter's pull is that of what it changes in the
        model: a parameter that starts at one number (zeros, or a scale's ones) is pulled to it, and the random factor
        beside a zero one is left free. So LoRA's B is pulled to 0 and A is not, which shrinks B A by exactly the same
        share as the pull of a full fine-tune. For that the adapter has to be new: it must change nothing yet.

        Args:
            model: A model, or a PEFT model.
            free: A regular expression: parameters whose names it finds are not pulled, such as a new head's.
            settings: Those of `AdamR`.
        """
        return cls([*_groups(model, free)], **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        _check_group(group)
        anchor = param_group["anchor"] = group["anchor"]
        given = isinstance(anchor, (list, tuple))
        if given:
            param_group["anchor"] = "given"  # tensors have no place among what is saved
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        anchors = anchor if given else [_anchor(parameter, anchor) for parameter in parameters]
        for parameter, its in zip(parameters, anchors, strict=True):
            _check_fit(parameter, its)
            self._anchors[parameter] = its

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = [*self._buckets()]
        parts = [bucket.follow_gradients() for bucket in buckets]
        if parts:
            count = sum(bucket.numel for bucket in buckets)
            mean = torch.stack([part.to(parts[0].device) for part in parts]).sum().div(count).sqrt()  # v̄
            for bucket in buckets:
                bucket.update(mean.to(bucket.device))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; after the first step also what the parameters are pulled to."""
        found = super().state_dict()
        if self.state:
            found["anchors"] = dict(enumerate(self._anchors[parameter] for parameter in self._own()))
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        rest = dict(state_dict)
        anchors = rest.pop("anchors", {})
        own = self._own()
        if anchors and len(anchors) != len(own):
            raise ValueError(f"the state must have anchors of {len(own)} parameters, but has those of {len(anchors)}")
        loaded = {own[i]: anchor.cpu() if isinstance(anchor, Tensor) else anchor for i, anchor in anchors.items()}
        for parameter, anchor in loaded.items():
            _check_fit(parameter, anchor)
        super().load_state_dict(rest)
        self._anchors.update(loaded)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_anchors": self._anchors}

    def _own(self) -> list[Tensor]:
        """The parameters whose anchors are kept here, and nowhere else."""
        groups = (group for group in self.param_groups if group["anchor"] != "given")
        return [parameter for group in groups for parameter in group["params"]]

    def _buckets(self) -> "Iterator[_Bucket]":
        """What has gradients, so much at a time that it needs little memory, but not a parameter at a time."""
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype, self._kind(p)), []).append(p)
            for (_, _, kind), parameters in alike.items():
                yield from self._cut(group, kind, parameters)

    def _cut(self, group: Mapping[str, Any], kind: type, parameters: list[Tensor]) -> "Iterator[_Bucket]":
        start, size, most = 0, 0, _BUCKETS.get(parameters[0].device.type, _BUCKET)
        for stop, parameter in enumerate(parameters):
            if size and size + parameter.numel() > most:
                yield self._bucket(group, kind, parameters[start:stop])
                start, size = stop, 0
            size += parameter.numel()
        if parameters[start:]:
            yield self._bucket(group, kind, parameters[start:])

    def _bucket(self, group: Mapping[str, Any], kind: type, parameters: list[Tensor]) -> "_Bucket":
        states = [self._state(parameter) for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        return _Bucket(
            group=group,
            kind=kind,
            parameters=parameters,
            gradients=[_gradient(parameter) for parameter in parameters],
            means=[state["exp_avg"] for state in states],
            squares=[state["exp_avg_sq"] for state in states],
            steps=[float(state["step"]) for state in states],
            anchors=[self._near(parameter) for parameter in parameters],
        )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """With the names that torch's Adam has for them."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _kind(self, parameter: Tensor) -> type:
        """The type of a parameter's anchor."""
        if parameter not in self._anchors:
            raise ValueError(
                "the parameters must be those that AdamR was made for, but others have taken their place: make the "
                "optimizer after the model has been sharded or moved"
            )
        return type(self._anchors[parameter])

    def _near(self, parameter: Tensor) -> Anchor:
        """The anchor, in memory from which it can be copied to the parameter's device while that works."""
        anchor = self._anchors[parameter]
        if isinstance(anchor, Tensor) and parameter.is_cuda and not anchor.is_cuda and not anchor.is_pinned():
            anchor = self._anchors[parameter] = anchor.pin_memory()
        return anchor


@dataclass
class _Bucket:
    """Parameters of one group, device, dtype and kind of anchor, and what belongs to each of them."""

    group: Mapping[str, Any]
    kind: type
    parameters: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]  # m
    squares: list[Tensor]  # v
    steps: list[float]  # t
    anchors: list[Any]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def numel(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def follow_gradients(self) -> Tensor:  # ()
        """Update m and v; returns the sum of v̂."""
        first, second = self.group["betas"]
        torch._foreach_lerp_(self.means, self.gradients, 1 - first)
        torch._foreach_mul_(self.squares, second)
        torch._foreach_addcmul_(self.squares, self.gradients, self.gradients, 1 - second)
        sums = torch._foreach_norm(self.squares, 1, dtype=_wide(self.squares[0].dtype))
        return torch.stack(torch._foreach_div(sums, self._corrections(second))).sum().to(torch.float32)

    def update(self, mean: Tensor) -> None:
        """W, by v̄ ()."""
        settings = self.group
        if self.kind is not type(None) and settings["pull"] > 0:
            strength = settings["lr"] * settings["pull"]
            self._pull(torch.where(mean > 0, strength / mean, 0) if settings["normalize"] else mean * 0 + strength)
        first, second = settings["betas"]
        roots = torch._foreach_sqrt(self.squares)
        torch._foreach_div_(roots, [correction**0.5 for correction in self._corrections(second)])
        torch._foreach_add_(roots, settings["eps"])
        rates = [-settings["lr"] / correction for correction in self._corrections(first)]
        torch._foreach_addcdiv_(self.parameters, self.means, roots, rates)

    def _pull(self, c: Tensor) -> None:  # ()
        anchors = self.anchors
        if self.kind is not float:
            anchors = [anchor.to(self.device, non_blocking=True) for anchor in anchors]
        if self.group["norm"] == "l2" and self.device.type == "cpu":  # one pass through memory, and not three
            share = min(float(c), 1.0)
            for parameter, anchor in zip(self.parameters, anchors, strict=True):
                parameter.lerp_(anchor if isinstance(anchor, Tensor) else parameter.new_tensor(anchor), share)
            return
        away = torch._foreach_sub(self.parameters, anchors)
        if self.group["norm"] == "l2":
            torch._foreach_mul_(away, c.clamp(max=1))
        else:
            for difference in away:
                difference.clamp_(-c, c)
        torch._foreach_sub_(self.parameters, away)

    def _corrections(self, beta: float) -> list[float]:
        return [1 - beta**step for step in self.steps]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse or gradient.is_complex():
        raise ValueError(f"AdamR needs dense real gradients, but got one of {tuple(parameter.shape)} that is not")
    return gradient


def _anchor(parameter: Tensor, anchor: str | float | None) -> Anchor:
    """What `anchor` means for a parameter."""
    if anchor != "start":
        return None if anchor is None else float(anchor)
    constant = _constant(parameter)
    if constant is not None:
        return constant
    return parameter.detach().to("cpu", copy=True)


def _constant(parameter: Tensor) -> float | None:
    """The number that a parameter is full of, if it is."""
    if parameter.is_meta or not parameter.numel():
        return None
    first = parameter.detach().flatten()[0]
    return float(first) if bool((parameter.detach() == first).all()) else None


def _check_group(group: Mapping[str, Any]) -> None:
    laws = {
        "lr": group["lr"] >= 0,
        "eps": group["eps"] >= 0,
        "pull": group["pull"] >= 0,
        "betas": all(0 <= beta < 1 for beta in group["betas"]),
        "norm": group["norm"] in ("l2", "l1"),
        "anchor": not isinstance(group["anchor"], str) or group["anchor"] == "start",
    }
    for name, kept in laws.items():
        if not kept:
            raise ValueError(f"{_LAWS[name]}, but got {name}={group[name]!r}")
    if group.get("weight_decay"):
        raise ValueError(
            "AdamR pulls to the weights before fine-tuning and not to 0, but got "
            f"weight_decay={group['weight_decay']}: set it to 0, and `pull` instead"
        )


_LAWS = {
    "lr": "`lr` must not be below 0",
    "eps": "`eps` must not be below 0",
    "pull": "`pull` must not be below 0",
    "betas": "`betas` must be in [0, 1)",
    "norm": "`norm` must be 'l2' or 'l1'",
    "anchor": "`anchor` must be 'start', a number, tensors or None",
}


def _check_fit(parameter: Tensor, anchor: Anchor) -> None:
    if isinstance(anchor, Tensor) and anchor.shape != parameter.shape:
        raise ValueError(
            f"a parameter of the shape {tuple(parameter.shape)} must be pulled to what has the same, but got one of "
            f"{tuple(anchor.shape)}"
        )


def _groups(model: nn.Module, free: str | None) -> Iterator[dict[str, Any]]:
    """The trained parameters by what they are pulled to."""
    anchors = _anchors_of(model)
    kinds: dict[str, list[nn.Parameter]] = {"start": [], "given": [], "free": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            anchor = None if free is not None and re.search(free, name) else anchors.get(name, "start")
            kind = "free" if anchor is None else "start" if isinstance(anchor, str) else "given"
            kinds[kind].append(parameter)
            if isinstance(anchor, Tensor):
                anchors[parameter] = anchor
    if not any(kinds.values()):
        raise ValueError("the model must have parameters to train, but all of them are frozen")
    given = [anchors[parameter] for parameter in kinds["given"]]
    for kind, anchor in {"start": "start", "given": given, "free": None}.items():
        if kinds[kind]:
            yield {"params": kinds[kind], "anchor": anchor}


def _anchors_of(model: nn.Module) -> dict[Any, Any]:
    """What is not pulled to its start: by name a tensor of the model, or None for what is free."""
    found: dict[Any, Any] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            originals = dict(module.original_module.named_parameters())
            for adapter, copy in module.modules_to_save.items():
                found |= {
                    f"{prefix}modules_to_save.{adapter}.{name}": originals[name].detach()
                    for name, _ in copy.named_parameters()
                }
        elif hasattr(module, "adapter_layer_names"):
            found |= dict.fromkeys(_free_factors(prefix, module))
    return found


def _free_factors(prefix: str, layer: Any) -> list[str]:
    """The names of an adapter's parameters that change nothing as long as what they meet is zero."""
    slots = tuple(f"{slot}." for slot in layer.adapter_layer_names)
    own = {n: p for n, p in layer.named_parameters() if n.startswith(slots) and p.requires_grad}
    constants = {name: _constant(parameter) for name, parameter in own.items()}
    random = [name for name, constant in constants.items() if constant is None and "magnitude" not in name]
    zero_factor = any(constant == 0 and own[name].ndim > 1 for name, constant in constants.items())
    if random and not (zero_factor and all(own[name].ndim > 1 for name in random)):
        raise ValueError(
            f"an adapter must be new, so that it changes nothing yet, but {prefix}{random[0]} holds all sorts of "
            "numbers and meets no zero: make the optimizer before weights are loaded, start the adapter at the "
            "identity, or give AdamR groups with an `anchor` each"
        )
    return [prefix + name for name in random]
