"""merge_adapter_files: adapters from folders and repositories into a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hf_modular.adapter_merging._files import locate_adapter, open_adapters
from hf_modular.adapter_merging._full import open_models
from hf_modular.adapter_merging._merge import REMEDY, compute
from hf_modular.adapter_merging._recipe import AdapterRecipe
from hf_modular.adapter_merging._report import AdapterReport, warn_of
from hf_modular.adapter_merging._result import Result, write
from hf_modular.adapter_merging._rmm import REMEDY as RMM_REMEDY
from hf_modular.adapter_merging._rmm import merge_reversibly
from hf_modular.checkpoints import refuse_occupied
from hf_modular.merging._method import MergeMethod
from hf_modular.merging.recipes._settings import depths
from hf_modular.merging.runs._report import RECIPE


def merge_adapter_files(
    recipe: str | Path | Mapping[str, Any] | AdapterRecipe,
    output_dir: str | Path,
    *,
    seed: int | None = None,
    overwrite: bool = False,
) -> AdapterReport:
    """Merge adapters from folders or repositories of the Hub into the folder of a new one.

    No model is loaded. LoRA adapters are read from their files alone. For the other types the config of the base model
    must be at hand, and its weights where an adapter's effect depends on them: they are read layer by layer.

    Args:
        recipe (`str | Path | dict | AdapterRecipe`):
            A recipe file, or what it would hold. It has the keys of mergekit's recipes, with adapters as `models`,
            and `space`, `rank`, `into` and `warn_above`, which mean what they mean for `merge_adapters`. With
            `merge_method: rmm` the `parameters` are those of `RMMConfig`, each of the `models` may have a name for
            its `task`, and with a `base_model` and a `rank` among the parameters, models may be full fine-tunes.
        output_dir (`str | Path`):
            A folder that is absent or empty. Until all is done there is no adapter in it.
        seed (`int`, *optional*):
            For methods that draw random numbers; the recipe's by default.
        overwrite (`bool`, defaults to `False`):
            Replace an adapter that is in the folder. Other files in it stay.

    Returns:
        `AdapterReport`: what was done. It is saved as `merge_report.json`, beside `merge_recipe.yaml`.
    """
    recipe = AdapterRecipe.load(recipe)
    if seed is not None:
        recipe = AdapterRecipe.load(recipe.model_dump(exclude_unset=True) | {"seed": seed})
    refuse_occupied(Path(output_dir), overwrite=overwrite)
    references = [entry.model for entry in recipe.models]
    if any(locate_adapter(reference).resolve() == Path(output_dir).resolve() for reference in references):
        raise ValueError(f"The output folder must not be one of the adapters, but is {output_dir}.")
    made, remedy = (_reversible, RMM_REMEDY) if recipe.is_reversible else (_merged, REMEDY)
    result = made(recipe, {"recipe": recipe.model_dump(exclude_defaults=True)})
    write(result, output_dir, overwrite=overwrite, more=lambda folder: _save(recipe, folder))
    warn_of(result.report, recipe.warn_above, remedy)
    return result.report


def _merged(recipe: AdapterRecipe, facts: Mapping[str, Any]) -> Result:
    sources, base = open_adapters([entry.model for entry in recipe.models], recipe.base_model)
    settings = recipe.settings
    return compute(
        sources,
        base,
        cast(MergeMethod, recipe.kind),
        lambda names: {name: settings.at(name, depth) for name, depth in depths(names).items()},
        recipe.options,
        facts,
    )


def _reversible(recipe: AdapterRecipe, facts: Mapping[str, Any]) -> Result:
    sources, base = open_models([entry.model for entry in recipe.models], recipe.base_model)
    config = cast(Any, recipe.settings.at("", 0.0).method)  # the same for all layers
    return merge_reversibly(sources, base, config, [entry.task_name for entry in recipe.models], facts)


def _save(recipe: AdapterRecipe, folder: Path) -> None:
    (folder / RECIPE).write_text(recipe.to_yaml(), "utf-8")
