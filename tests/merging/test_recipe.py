"""Recipes: mergekit's format as it is used, and every mistake named with its line."""

from itertools import pairwise

import pytest

from hf_modular.merging import DAREConfig, MergeRecipe, TaskArithmeticConfig
from hf_modular.merging.recipes._settings import depths, evaluate

GOOD = """\
merge_method: dare_linear
base_model: org/base@main
models:
  - model: org/one
    parameters:
      weight: 0.6
      density: 0.5
  - model: org/two
    parameters:
      weight: [0, 0.5, 1]
parameters:
  density: 0.25
  lambda: 0.9
  int8_mask: true
dtype: bfloat16
tokenizer_source: base
"""

SLICES = """\
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {}}
      - {model: b, layer_range: [4, 8]}
    parameters: {t: 0.3}
"""


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder, text):
    with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
        MergeRecipe.load(write(folder, text))
    return str(error.value)


def test_a_mergekit_recipe(tmp_path):
    recipe = MergeRecipe.load(write(tmp_path, GOOD))
    resolved = recipe.settings.at("model.layers.1.w", 0.5)
    assert resolved.method == DAREConfig(drop=0.75, scale=0.9, rescale="norm")
    assert resolved.weights == (0.6, 0.5)
    assert resolved.each == {"drop": (0.5, 0.75)}
    assert recipe.result_dtype == "bfloat16"
    assert recipe.tokenizer_model == "org/base@main"


def test_mergekits_name_has_mergekits_defaults():
    models = [{"model": "a"}, {"model": "b"}]
    assert MergeRecipe.load({"merge_method": "dare_linear", "base_model": "c", "models": models}).method == DAREConfig(
        drop=0.0, rescale="norm"
    )
    ours = MergeRecipe.load({"merge_method": "dare", "base_model": "c", "models": models})
    assert ours.method == DAREConfig()
    plain = {"merge_method": "dare_linear", "base_model": "c", "models": models, "parameters": {"rescale": False}}
    assert MergeRecipe.load(plain).settings.at("w", 0).method.rescale == "none"


def test_a_recipe_survives_the_disk(tmp_path):
    recipe = MergeRecipe.load(write(tmp_path, GOOD + "seed: 7\n"))
    again = MergeRecipe.load(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.seed == 7


def test_a_recipe_from_settings():
    recipe = MergeRecipe.of(TaskArithmeticConfig(scale=0.3), ["a", "b"], "base", weights=[1, -1], out_dtype="float16")
    assert recipe.settings.at("w", 0.0).method == TaskArithmeticConfig(scale=0.3)
    assert recipe.settings.at("w", 0.0).weights == (1, -1)
    assert recipe.result_dtype == "float16"


def test_slices():
    recipe = MergeRecipe.load(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "slices": [
                {
                    "sources": [
                        {"model": "base", "layer_range": [0, 2]},
                        {"model": "a", "layer_range": [1, 3], "parameters": {"weight": 0.25}},
                        {"model": "b", "layer_range": [0, 2]},
                    ],
                    "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}], "lambda": 0.5},
                },
                {"base_model": "c", "sources": [{"model": m, "layer_range": [7, 8]} for m in ("d", "c")]},
            ],
            "parameters": {"weight": 0.75, "lambda": 2},
        }
    )
    first, second = recipe.sections
    assert (first.base, first.models, first.layers) == (("base", 0, 0), [("a", 1, 1), ("b", 0, 2)], 2)
    assert (second.base, second.models, second.layers) == (("c", 7, 1), [("d", 7, 0)], 1)
    assert first.settings.at("mlp.w", 0.5).weights == (0.25, 0.5)
    assert first.settings.at("attn.w", 0.5).weights == (0.25, 0.75)
    assert first.settings.at("w", 0).method == TaskArithmeticConfig(scale=0.5)
    assert second.settings.at("w", 0).method == TaskArithmeticConfig(scale=2)
    assert recipe.references == ["base", "a", "b", "d", "c"]


def test_every_reference_is_renamed():
    models = [{"model": "a"}, {"model": "b"}]
    tokens = {"a": {"source": "a"}, "x": {"source": {"kind": "model_token", "model": "b", "token": "a"}}}
    more = {"tokenizer": {"source": "a", "tokens": tokens}, "heads": "b", "chat_template": "a"}
    recipe = MergeRecipe.load({"merge_method": "linear", "models": models} | more).renamed({"a": "a@1", "b": "b@2"})
    assert [entry.model for entry in recipe.models] == ["a@1", "b@2"]
    assert (recipe.tokenizer.source, recipe.heads, recipe.chat_template) == ("a@1", "b@2", "a@1")
    assert recipe.tokenizer.tokens["a"].source == "a@1"
    assert recipe.tokenizer.tokens["x"].source.model == "b@2"
    assert recipe.tokenizer.tokens["x"].source.token == "a"


def test_a_base_among_the_models_has_no_task_vector():
    models = [{"model": "base"}, {"model": "a", "parameters": {"weight": 0.3}}]
    recipe = MergeRecipe.load({"merge_method": "task_arithmetic", "base_model": "base", "models": models})
    assert [entry.model for entry in recipe.task_models] == ["a"]
    assert recipe.settings.at("w", 0).weights == (0.3,)
    average = MergeRecipe.load({"merge_method": "linear", "base_model": "base", "models": models})
    assert [entry.model for entry in average.task_models] == ["base", "a"]


@pytest.mark.parametrize(
    ("setting", "name", "depth", "expected"),
    [
        (0.3, "x", 0.5, 0.3),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 1, 0], "x", 0.5, 1.0),
        ([0, 0.5, 1], "x", 0.75, 0.75),
        ([1, 2, 3], "x", 1.0, 3.0),
        (["a", "b"], "x", 0.5, "a"),
        (["a", "b"], "x", 1.0, "b"),
        ([{"filter": "mlp", "value": 0.5}, {"value": 0.1}], "layers.0.mlp.w", 0, 0.5),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 0.1}], "layers.0.mlp.w", 0.5, 0.5),
        ([{"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 0.1}], "layers.0.attn.w", 0, 0.1),
        ([{"filter": "mlp", "value": 0.5}], "layers.0.attn.w", 0, None),
        ({"filter": "attn", "value": 0.5}, "layers.0.attn.w", 0, 0.5),
    ],
)
def test_filters_and_gradients(setting, name, depth, expected):
    assert evaluate(setting, name, depth) == expected


def test_a_filter_that_does_not_fit_falls_back():
    models = [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 2}]}}, {"model": "b"}]
    recipe = MergeRecipe.load({"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}})
    assert recipe.settings.at("mlp.w", 0).weights == (2, 0.5)
    assert recipe.settings.at("attn.w", 0).weights == (0.5, 0.5)


def test_depths():
    names = ["embed.w", "layers.0.w", "layers.1.w", "layers.2.w", "layers.2.experts.7.w", "single.0.w", "head.w"]
    assert [*depths(names).values()] == [0, 0, 0.5, 1, 1, 1, 0]


REFUSED = {
    "unknown key": (GOOD + "merge_metod: x\n", "line 17, merge_metod: there is no such key, there are"),
    "unknown key of a model": (
        GOOD.replace("    parameters:\n      weight: 0.6", "    weight: 0.6\n    parameters:"),
        "line 5, models[0].weight: there is no such key",
    ),
    "misspelt setting": (
        GOOD.replace("density: 0.25", "densty: 0.25"),
        "line 12, parameters.densty: 'dare_linear' has",
    ),
    "a setting of another method": (GOOD.replace("lambda", "epsilon"), "has no setting 'epsilon', it has ['density'"),
    "without effect in mergekit": (
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a, parameters: {density: 0.5}}]\n",
        "has no setting 'density', it has ['normalize', 'scale', 'weight']; mergekit passes over it, so remove it",
    ),
    "our word under their name": (GOOD.replace("density: 0.25", "drop: 0.25"), "has no setting 'drop'"),
    "value outside its law": (
        GOOD.replace("density: 0.5", "density: 1.5"),
        "line 7, models[0].parameters.density: `drop` must be in [0, 1), but got drop=-0.5",
    ),
    "value in a gradient": (
        GOOD.replace("[0, 0.5, 1]", "[0, x, 1]"),
        "line 10, models[1].parameters.weight[1]: `weight`",
    ),
    "text for a number": (GOOD.replace("0.9", "much"), "line 13, parameters.lambda: `scale` must be of type float"),
    "empty list": (GOOD.replace("[0, 0.5, 1]", "[]"), "a list must hold values"),
    "mixed list": (GOOD.replace("[0, 0.5, 1]", "[0, {value: 1}]"), "a list must hold values only, or filtered"),
    "filter without value": (GOOD.replace("[0, 0.5, 1]", "{filter: mlp}"), "must have a `value`"),
    "filter misspelt": (GOOD.replace("[0, 0.5, 1]", "{fliter: mlp, value: 1}"), "may have a text as `filter`"),
    "not per model": (GOOD.replace("      density: 0.5", "      lambda: 1"), "cannot differ between models"),
    "not a method": (
        GOOD.replace("dare_linear", "daer_linear"),
        "line 1, merge_method: there is no method 'daer_linear'",
    ),
    "no method": (GOOD.replace("merge_method: dare_linear\n", ""), "merge_method: this key is missing"),
    "no models": (GOOD.split("models:")[0], "models: this key is missing"),
    "no base": (
        GOOD.replace("base_model: org/base@main\n", "").replace("tokenizer_source: base\n", ""),
        "needs a base_model",
    ),
    "a model twice": (GOOD.replace("org/two", "org/one"), "line 8, models[1].model: each model may be listed once"),
    "unused base": ("merge_method: linear\nbase_model: x\nmodels: [{model: a}, {model: b}]\n", "uses no base"),
    "only the base": ("merge_method: task_arithmetic\nbase_model: x\nmodels: [{model: x}]\n", "but the recipe has 0"),
    "dtype": (GOOD.replace("bfloat16", "bfloat17"), "line 15, dtype: Input should be 'float32'"),
    "seed": (GOOD + "seed: -1\n", "line 17, seed"),
    "seed of truth": (GOOD + "seed: true\n", "line 17, seed"),
    "slices and models": (
        "merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        "line 2, models: give one of `models`, `slices` and `modules`, not models and slices",
    ),
    "no slices": ("merge_method: linear\nslices: []\n", "line 2, slices: List should have at least 1 item"),
    "modules": (
        "merge_method: linear\nmodules: {}\nmodels: [{model: a}]\n",
        "line 2, modules: Dictionary should have at least 1 item",
    ),
    "empty range": (SLICES.replace("[0, 4]", "[4, 4]"), "line 5, slices[0].sources[0].layer_range: must be [first"),
    "negative range": (SLICES.replace("[0, 4]", "[-1, 3]"), "but is [-1, 3]"),
    "half a range": (SLICES.replace("[0, 4]", "[4]"), "line 5, slices[0].sources[0].layer_range"),
    "unequal ranges": (SLICES.replace("[4, 8]", "[4, 9]"), "as many layers, 4 as the first, but [4, 9] are 5"),
    "layers twice": (SLICES.replace("b, layer_range: [4, 8]", "a, layer_range: [0, 4]"), "are listed twice"),
    "base not in the slice": (SLICES.replace("base_model: a", "base_model: c"), "the base, 'c', must be listed among"),
    "too many in a slice": (
        SLICES.replace(
            "      - {model: b",
            "      - {model: c, layer_range: [0, 4]}\n      - {model: d, layer_range: [0, 4]}\n      - {model: b",
        ),
        "merges from 1 to 2 models, but the slice has 3",
    ),
    "misspelt in a slice": (
        SLICES.replace("{t: 0.3}", "{tt: 0.3}"),
        "line 7, slices[0].parameters.tt: 'slerp' has no",
    ),
    "unknown in a source": (
        SLICES.replace("{model: b,", "{model: b, x: 1,"),
        "there is no such key, there are ['layer_",
    ),
    "residual_weight": (SLICES + "    residual_weight: 0.5\n", "mergekit reads this key and does nothing with it"),
    "range outside slices": (
        GOOD.replace("  - model: org/one", "  - layer_range: [0, 4]\n    model: org/one"),
        "line 4, models[0].layer_range: a range of layers is given under `slices`",
    ),
    "foreign tokenizer": (
        GOOD.replace("source: base", "source: org/three"),
        "the tokenizer must be 'base', 'union' or",
    ),
    "heads of nobody": (GOOD + "heads: org/three\n", "line 17, heads: must be 'error', 'base' or one of"),
    "vocab and tokenizer": (GOOD + "vocab: pad\n", "a tokenizer decides which rows"),
    "two tokenizers": (GOOD + "tokenizer: {source: base}\n", "`tokenizer` or `tokenizer_source`, not both"),
    "token of nobody": (
        GOOD.replace("tokenizer_source: base", "tokenizer: {tokens: {x: {source: org/three}}}"),
        "line 16, tokenizer.tokens.x: the embedding must come from one of",
    ),
    "half a token": (
        GOOD.replace("tokenizer_source: base", "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}"),
        "`kind: model_token` needs a `model`, and a `token` or a `token_id`",
    ),
    "no template": (GOOD + "chat_template: chatlm\n", "must be Jinja text, 'auto', one of ['alpaca', 'chatml'"),
    "a key twice": (GOOD + "dtype: float32\n", "line 17: the key 'dtype' was given in line 15 already"),
    "a key twice in one line": (
        GOOD.replace("[0, 0.5, 1]", "{value: 1, value: 2}"),
        "the key 'value' was given in line 10",
    ),
    "a list": ("- merge_method\n", "must hold keys such as `merge_method`"),
    "nothing": ("", "must hold keys such as `merge_method`"),
    "broken YAML": ("models: [\n", "must hold a YAML recipe"),
    "two documents": (GOOD + "---\n" + GOOD, "must hold a YAML recipe"),
    "an object": ("models: !!python/object/apply:os.system ['true']\n", "must hold a YAML recipe"),
    "a date": (GOOD.replace("dare_linear", "2026-01-01"), "line 1, merge_method"),
    "alias bomb": (
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 8)}]\n" for x, y in pairwise("abcdefg")),
        "nested too deeply or repeats",
    ),
    "half a character": (
        GOOD.replace("org/two", '"\\ud800"'),
        "line 8: '\\ud800' must be text, but has half a surrogate",
    ),
    "half a character in a key": (GOOD.replace("densty", "") + '"\\ud800": 1\n', "line 17: '\\ud800' must be text"),
    "alias to itself": ("a: &a [*a]\n", "nested too deeply or repeats"),
    "deep nesting": ("a: " + "[" * 3000, "must hold a YAML recipe"),
    "too long": ("# " + "x" * (1 << 20), "must have at most"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_named_with_its_line(tmp_path, mistake):
    text, message = REFUSED[mistake]
    assert message in refusal(tmp_path, text)


def test_all_mistakes_are_named_at_once(tmp_path):
    text = GOOD.replace("density: 0.25", "densty: 0.25").replace("lambda: 0.9", "lambda: much")
    message = refusal(tmp_path, text)
    assert "densty" in message
    assert "much" in message


def test_aliases_are_allowed(tmp_path):
    text = GOOD.replace("[0, 0.5, 1]", "*w").replace("weight: 0.6", "weight: &w 0.6")
    assert MergeRecipe.load(write(tmp_path, text)).settings.at("x", 0).weights == (0.6, 0.6)


def test_numbers_as_people_write_them(tmp_path):
    text = GOOD.replace("lambda: 0.9", "lambda: 1e-2")
    assert MergeRecipe.load(write(tmp_path, text)).settings.at("x", 0).method.scale == 0.01


def test_a_missing_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        MergeRecipe.load(tmp_path / "none.yaml")


def test_a_dictionary_has_no_lines():
    with pytest.raises(ValueError, match=r"the recipe cannot be used:\n  - parameters\.drp: 'dare' has no setting"):
        MergeRecipe.load(
            {"merge_method": "dare", "base_model": "b", "models": [{"model": "a"}], "parameters": {"drp": 1}}
        )


def test_the_schema_explains_every_key():
    properties = MergeRecipe.model_json_schema()["properties"]
    assert all(content.get("description", "").endswith(".") for content in properties.values())
