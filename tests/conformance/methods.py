"""What PEFT's tests are run with: a row of settings per adapter method, and where a test does not apply.

A new method is one row of METHODS.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import HiraConfig, LoraConfig, PeftConfig

from hf_modular import adapters

Settings = dict[str, Any]
Row = tuple[Any, ...]


ALL_KINDS = ("Linear", "Conv1D", "Embedding", "Conv", "Norm")
MATRICES = ("Linear", "Conv1D", "Embedding", "Conv")


@dataclass(frozen=True)
class Method:
    """How one method is tested.

    `settings` start at the identity, as PEFT asks of its own rows. The first is tried on every layer of `PLACES`
    that is of one of the `kinds`, the others on the first place of each kind. `fits` says what the layers of PEFT's
    custom models need beside, by the models' names, and under "*" for all others. `other` makes a second adapter
    differ from the first. `unmergeable` is the reason why the method has no merged form, `cannot` why single tests
    do not apply, by the test's name and a part of the row's.
    """

    config: type[PeftConfig]
    settings: dict[str, Settings]
    other: Settings
    kinds: tuple[str, ...] = MATRICES
    fits: dict[str, Settings] = field(default_factory=dict)
    unmergeable: str | None = None
    cannot: dict[tuple[str, str], str] = field(default_factory=dict)

    def fit(self, model: str) -> Settings:
        return next((settings for models, settings in self.fits.items() if model in models.split()), self.anywhere)

    @property
    def anywhere(self) -> Settings:
        return self.fits.get("*", {})


_COUNTS = "one pool serves all layers, so fewer layers are not fewer tensors, which PEFT's test counts"
_FLATTENED = "OPT hands its feed-forward layers all tokens in one row, so that they cannot tell the samples apart"
_NOT_LINEAR = "its bottleneck is not linear and has no merged form"

METHODS = {
    "compacter": Method(
        adapters.CompacterConfig,
        {
            "factorized": {"init_weights": True, "reduction_factor": 4},
            "phm": {
                "init_weights": True,
                "reduction_factor": 4,
                "factorized": False,
                "shared_rule": False,
                "non_linearity": "swish",
            },
        },
        {"non_linearity": "tanh"},
        MATRICES,
        {
            "MLP MLP2 Conv2d Conv2d1x1 Conv3d": {"reduction_factor": 1, "phm_dim": 2},
            "Conv2d2 Conv2dGroups Conv1dBigger Conv1dGroups": {"phm_dim": 2},
            "*": {"reduction_factor": 1, "phm_dim": 1},
        },
        unmergeable=_NOT_LINEAR,
        cannot={
            ("test_mixed_adapter_batches_merged_raises", ""): _NOT_LINEAR,
            ("test_mixed_adapter_batches", "OPTForCausalLM"): _FLATTENED,
            ("test_generate_with_mixed_adapter_batches", "OPTForCausalLM"): _FLATTENED,
        },
    ),
    "flora": Method(adapters.FLoRAConfig, {"r=8": {}, "ranks": {"ranks": [2, 1, 1, 1, 1]}}, {"r": 3, "ranks": None}),
    "hut": Method(
        adapters.HUTConfig,
        {"tile": {}, "row_column": {"form": "row_column"}, "low_rank": {"form": "low_rank"}},
        {"r": 3},
    ),
    "mos": Method(
        adapters.MoSConfig,
        {"private": {}, "public": {"private_r": 0}},
        {"budget_r": 3},
        MATRICES,
        {"MLP MLP2 Conv2d2 Conv2dGroups": {"shards": 2}, "*": {"shards": 1}},
        cannot={
            ("test_training_decoders_layer_indexing", ""): _COUNTS,
            ("test_training_encoder_decoders_layer_indexing", ""): _COUNTS,
            ("test_training_layer_indexing", ""): _COUNTS,
        },
    ),
    "rmm": Method(
        adapters.RMMAdapterConfig,
        {
            "position": {"tasks": ["mrpc", "sst2"]},
            "tensor": {"tasks": ["mrpc", "sst2"], "granularity": "tensor"},
            "layer": {"tasks": ["mrpc", "sst2"], "granularity": "layer"},
        },
        {"r": 3},
    ),
    "ssf": Method(
        adapters.SSFConfig,
        {"identity": {"init_weights": "identity"}},
        {"shift": False},
        ALL_KINDS,
    ),
}

# PEFT's own, for comparison: its rows are taken as they are.
BASELINES: dict[str, type[PeftConfig]] = {"lora": LoraConfig, "hira": HiraConfig}


def _at(*targets: str, **settings: Any) -> Settings:
    return {"target_modules": list(targets), **settings}


# (kind, one of PEFT's custom models, what is targeted in it)
PLACES: list[tuple[str, str, Settings]] = [
    ("Linear", "MLP", _at("lin0", "lin1")),
    ("Linear", "MLP", {"target_modules": "lin0"}),
    ("Linear", "MLP", _at("lin0")),
    ("Linear", "MLP", _at("lin1")),
    ("Linear", "MLP", _at("lin0", modules_to_save=["lin1"])),
    ("Linear", "MLP", {"target_modules": ".*0$", "exclude_modules": "lin1"}),
    ("Linear", "MLP2", _at("lin0", "lin1")),
    ("Linear", "EmbConv1D", _at("lin0", trainable_token_indices={"emb": [0, 10]})),
    ("Conv1D", "EmbConv1D", _at("conv1d", "lin0")),
    ("Conv1D", "EmbConv1D", _at("conv1d")),
    ("Conv1D", "EmbConv1D", _at("conv1d", modules_to_save=["lin0"])),
    ("Embedding", "EmbConv1D", _at("emb")),
    ("Embedding", "EmbConv1D", _at("emb", "conv1d")),
    ("Conv", "Conv2d", _at("conv2d")),
    ("Conv", "Conv2d", _at("conv2d", "lin0")),
    ("Conv", "Conv2d2", _at("conv2d", "lin0")),
    ("Conv", "Conv2d1x1", _at("conv2d")),
    ("Conv", "Conv2dGroups", _at("conv2d")),
    ("Conv", "Conv2dGroups2", _at("conv2d")),
    ("Conv", "Conv1d", _at("conv1d")),
    ("Conv", "Conv1dBigger", _at("conv1d")),
    ("Conv", "Conv1dGroups", _at("conv1d")),
    ("Conv", "Conv3d", _at("conv3d")),
    ("Conv", "Conv3d", _at("conv3d", "lin0")),
    ("Norm", "MLP_LayerNorm", _at("layernorm0", "layernorm1")),
    ("Norm", "MLP_LayerNorm", _at("layernorm0", modules_to_save=["layernorm1"])),
    ("Norm", "MLP_LayerNorm", _at("layernorm1", "lin0")),
]

TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}


def custom_rows(method: Method) -> Iterator[Row]:
    """(test name, model, config class, settings) for the custom models."""
    for number, (name, settings) in enumerate(method.settings.items()):
        seen: set[str] = set()
        for kind, model, places in PLACES:
            if kind in method.kinds and (number == 0 or kind not in seen):
                seen.add(kind)
                yield f"{name} {model}", model, method.config, {**places, **settings, **method.fit(model)}


def pair_rows(method: Method) -> Iterator[Row]:
    """(test name, its method, config class, settings 1, settings 2) for two adapters that are active at once."""
    for name, settings in method.settings.items():
        off = {**settings, **method.fit("MLP"), "init_weights": False}
        label = method.config.__name__
        yield f"{name} same", label, method.config, {**_at("lin0"), **off}, {**_at("lin0"), **off}
        yield f"{name} shapes", label, method.config, {**_at("lin0"), **off}, {**_at("lin0"), **off, **method.other}
        yield f"{name} different", label, method.config, {**_at("lin0"), **off}, {**_at("lin1"), **off}
        yield f"{name} overlap", label, method.config, {**_at("lin0", "lin1"), **off}, {**_at("lin1"), **off}


def transformers_rows(method: Method, task: str) -> Iterator[Row]:
    """(config class, settings) for the models of transformers, at the targets that are usual for them."""
    for settings in method.settings.values():
        yield method.config, {"task_type": task, "target_modules": None, **settings}
    if task == "CAUSAL_LM":
        first = next(iter(method.settings.values()))
        yield method.config, {"task_type": task, "target_modules": None, **first, "trainable_token_indices": [0, 1, 3]}


def mixed_rows(method: Method, first: Settings, second: Settings) -> Iterator[Row]:
    """(test name, config 1, config 2) for batches in which each sample has its own adapter."""
    for name, settings in method.settings.items():
        off = {**settings, **method.anywhere, "init_weights": False}
        yield name, method.config(**{**first, **off}), method.config(**{**second, **off, **method.other})


def single_configs(method: Method, *places: Settings) -> Iterator[PeftConfig]:
    for settings in method.settings.values():
        for place in places:
            yield method.config(**{**place, **settings, **method.anywhere, "init_weights": False})


# -- which list of which test is filled with what ------------------------------------------------------------------


def rows_of_list(method: Method, module: str, name: str) -> list[Row] | None:
    """What replaces the list `name` of PEFT's test module; None if it is none of those for all methods."""
    if name == "ALL_CONFIGS":
        return list(transformers_rows(method, TASKS[module]))
    return list(_LISTS[name](method)) if name in _LISTS else None


_LISTS: dict[str, Callable[[Method], Iterable[Any]]] = {
    "TEST_CASES": custom_rows,
    "ALL_PEFT_CONFIG_CLASSES": lambda method: [method.config],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": pair_rows,
    "MIXED_ADAPTER_TEST_CASES": lambda method: mixed_rows(method, _at("lin0"), _at("lin0")),
    "ALL_CONFIG_CLASSES": lambda method: [(method.config, settings) for settings in [{}, *method.settings.values()]],
    "LAYER_INDEXING_CONFIG_CLASSES": lambda method: [(method.config, {})],
}


def rows_of_test(method: Method, test: str) -> list[Any] | None:
    """What replaces the list that PEFT wrote into the test itself; None if the test is not about all methods."""
    if test in _MIXED:
        kinds, first, second = _MIXED[test]
        return list(mixed_rows(method, first, second)) if set(kinds) <= set(method.kinds) else None
    if test in _CLASSES:
        return [partial(method.config, **method.anywhere)]
    return list(_INLINE[test](method)) if test in _INLINE else None


_MIXED: dict[str, tuple[tuple[str, ...], Settings, Settings]] = {
    "test_mixed_adapter_batches_different_target_layers": (("Linear",), _at("lin0"), _at("lin1")),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": (("Linear",), _at("lin0"), _at("lin0", "lin1")),
    "test_mixed_adapter_batches_multiple_modules_to_save": (
        ("Linear",),
        _at("lin0", modules_to_save=["lin1"]),
        _at("lin0", modules_to_save=["lin1"]),
    ),
    "test_mixed_adapter_batches_unsupported_layer_raises": (
        ("Linear",),
        _at("lin0", modules_to_save=["gru"]),
        _at("lin0", modules_to_save=["gru"]),
    ),
    "test_mixed_adapter_batches_lora_conv1d_emb": (
        ("Conv1D", "Embedding"),
        _at("emb", "conv1d"),
        _at("emb", "conv1d"),
    ),
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": (
        ("Conv1D", "Embedding"),
        _at("emb", "conv1d", modules_to_save=["lin0"]),
        _at("emb", "conv1d", modules_to_save=["lin0"]),
    ),
    "test_mixed_adapter_batches_lora_conv2d": (("Conv",), _at("conv2d"), _at("conv2d")),
}
_CLASSES = {
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_default_target_modules_not_set_raises",
    "test_default_target_modules_not_set_model_type_set_raises",
}


def _vision(method: Method) -> Iterator[PeftConfig]:
    place = _at("convolution", modules_to_save=["classifier", "normalization"])
    for settings in method.settings.values() if "Conv" in method.kinds else []:
        yield method.config(**{**place, **settings, **method.anywhere})


def _embedding(name: str, method: Method) -> Iterable[PeftConfig]:
    places = [_at("lin0", name), {"target_modules": rf"(.*\.)?{name}"}]
    return single_configs(method, *places) if "Embedding" in method.kinds else []


_INLINE: dict[str, Callable[[Method], Iterable[Any]]] = {
    "test_adapter_name_makes_no_difference": lambda method: single_configs(method, _at("lin0")),
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": lambda method: [
        (f"row {number}", config) for number, config in enumerate(single_configs(method, _at("lin0")))
    ],
    "test_model_with_batchnorm_reproducibility": _vision,
    "test_save_pretrained_targeting_lora_to_embedding_layer": partial(_embedding, "embed_tokens"),
    "test_save_pretrained_targeting_lora_to_embedding_layer_non_transformers": partial(_embedding, "emb"),
}


# -- tests that PEFT wrote for some of its types only ----------------------------------------------------------------

# Tests about every method that PEFT wrote down with LoRA; our class takes its place.
WRITTEN_FOR_LORA = {
    "test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_delete_adapter_multiple_adapters_with_trainable_token_indices",
    "test_delete_adapter_with_multiple_adapters_works",
    "test_existing_model_card",
    "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
    "test_load_does_not_overwrite_similarly_named_sibling",
    "test_loading_model_with_trainble_tokens_requires_grad_set_correctly",
    "test_multiple_active_adapters_with_different_trainable_token_indices_works",
    "test_multiple_active_adapters_with_same_trainable_token_indices_raises",
    "test_multiple_adapters_automatic_modules_to_save",
    "test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_non_existing_model_card",
    "test_save_embedding_layers_excludes_similarly_named_sibling",
    "test_set_adapter_non_overlapping_trainable_token_indices",
    "test_weight_bias_attributes",
}

# PEFT skips by class what a type of its own cannot do. Where ours can, our class takes the place of one that can:
# (test, module that asks, the class that may pass, parts of the rows' names)
PASSES_AS: list[tuple[str, ...]] = [
    ("test_mixed_adapter_batches", "test_decoder_models", "LoraConfig"),
    ("test_mixed_adapter_batches", "testing_common", "RoadConfig"),
    ("test_generate_with_mixed_adapter_batches", "test_decoder_models", "LoraConfig"),
    ("test_generate_with_mixed_adapter_batches", "testing_common", "LoraConfig"),
    # the tolerance for convolutions in groups
    ("test_safe_merge", "testing_common", "LoHaConfig"),
    ("test_disable_adapters_with_merging", "test_custom_models", "LoHaConfig"),
    # a learning rate at which the weights stay finite, which PEFT too sets by class
    ("test_parameters_after_loading_model", "test_custom_models", "AdaLoraConfig"),
    ("test_disable_adapters", "test_custom_models", "PveraConfig", "Conv2dGroups2", "FLoRA"),
    # a start with gradients for all factors
    ("test_only_params_are_updated", "test_custom_models", "UniLoraConfig", "low_rank"),
    ("test_only_params_are_updated", "test_custom_models", "UniLoraConfig", "Compacter"),
    # and a rate and a number of steps after which all factors have moved
    ("test_only_params_are_updated", "test_custom_models", "GloraConfig", "EmbConv1D", "RMM"),
    # GPT-2's Conv1D
    ("test_generate_half_prec", "testing_common", "LoHaConfig"),
    ("test_merge_layers", "testing_common", "LoHaConfig"),
    ("test_merge_layers_fp16", "testing_common", "LoHaConfig"),
    ("test_merge_layers_nan", "testing_common", "LoHaConfig"),
    ("test_peft_model_device_map", "testing_common", "LoHaConfig"),
    ("test_training_decoders_layer_indexing", "testing_common", "LoHaConfig"),
]

# Questions that skip, or change the targets, by the model and the name of the config class: (module, function)
NOT_ASKED = [
    ("test_decoder_models", "check_beft_config"),
    ("test_feature_extraction_models", "skip_deberta_lora_tests"),
]

# Not run for anybody: (test, why)
NOT_ABOUT_ADAPTERS = {
    "test_disable_adapter_with_bias_warns": "PEFT skips it for every type",
    "test_passing_input_embeds_works in test_feature_extraction_models": "about prompt learning",
    "test_prompt_tuning_sample_vocab_prepare_for_training": "about prompt learning",
    "test_prompt_tuning_text_prepare_for_training": "about prompt learning",
    "test_set_requires_grad_prompt_learning_raises": "about prompt learning",
    "test_training_prompt_learning_tasks": "about prompt learning",
    "test_weighted_combination_of_adapters": "calls LoRA's or IA3's own `add_weighted_adapter`",
    "test_from_pretrained_cache_dir": "downloads from the Hub into an empty folder",
}

# Where ours differs from what PEFT's test asks for, on purpose: (test, why)
DIFFERENT_ON_PURPOSE: dict[str, str] = {}

# Every list and test that the tables name: PEFT's tests must have them all, or nothing would say that they are gone.
NAMED = {
    "ALL_CONFIGS",
    *_LISTS,
    *_INLINE,
    *_MIXED,
    *_CLASSES,
    *WRITTEN_FOR_LORA,
    *NOT_ABOUT_ADAPTERS,
    *DIFFERENT_ON_PURPOSE,
    *(test for test, *_ in PASSES_AS),
    *(test for method in METHODS.values() for test, _ in method.cannot),
}
