"""Recipes: strict, typed, every mistake at once, and what is stored can be fed back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loralab.config.loading import load_recipe, recipe_from_tree, shipped_recipes, to_yaml
from loralab.config.recipe import Recipe, recipe_schema
from loralab.errors import RecipeError

SMALL = """
model: {name: some/model}
data: {name: some/data, source: text, target: summary}
variants:
  zero-shot: {training.method: none}
  lora-8: {lora.rank: 8}
published:
  lora-8: {rouge1: 40.0}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(SMALL)
    return file


def mistakes(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return str(caught.value).splitlines()[1:]


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_resolves_with_all_its_variants(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and (recipe.variants or recipe.model.init == "random")
    for variant in recipe.variants:
        assert recipe.variant(variant).name == variant


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_a_resolved_recipe_can_be_fed_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    for variant in recipe.variants:
        (tmp_path / "variant.yaml").write_text(to_yaml(recipe.variant(variant)))
        assert load_recipe(tmp_path / "variant.yaml") == recipe.variant(variant)


def test_overrides_are_typed(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            *(
                "lora.rank=32",
                "lora.alpha=null",
                "lora.rules=[q, v]",
                "lora.rank_pattern={wo: 4}",
                "variants.lora-8.lora.alpha=4",
            ),
            *("optimizer.learning_rate=1e-4", "optimizer.max_grad_norm=null"),
            *("data.prompt='a: {text} = b'", "data.max_source_length=p85"),
        ],
    )
    assert (recipe.lora.rank, recipe.optimizer.learning_rate, recipe.lora.alpha, recipe.lora.rules) == (
        32,
        1e-4,
        None,
        ("q", "v"),
    )
    assert (
        recipe.data.prompt == "a: {text} = b"
        and recipe.optimizer.max_grad_norm is None
        and recipe.data.max_source_length == "p85"
    )
    assert (
        recipe.variant("lora-8").lora.alpha == 4
        and recipe.variant("lora-8").lora.rank == 8
        and recipe.variant("zero-shot").lora.rank == 32
    )
    assert recipe.lora.rank_pattern == {"wo": 4}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Headline: {text}",
            "a: {text}: b",
            "- {text}",
            "{text}",
            "{text} TL;DR",
            "[x] {text}",
            "# {text}",
            "& {text}",
        ),
        *("Summarise {text} # tldr:", "Text:\n\n{text}\n\nTitle:\n", "  {text} ", "'a' {text} 'b'", '"a" {text} # "b"'),
    ],
)
def test_a_prompt_stands_as_it_is_given(text: str, recipe_file: Path) -> None:
    other = "forgetting.x={name: x, source: text, target: summary}"
    keys = ("data.prompt", "forgetting.x.prompt", "variants.lora-8.data.prompt")
    recipe = load_recipe(recipe_file, [other, *(f"{key}={text}" for key in keys)])
    assert recipe.data.prompt == recipe.forgetting["x"].prompt == recipe.variant("lora-8").data.prompt == text


@pytest.mark.parametrize(
    ("text", "read"), [("'{text}'", "{text}"), (' "{text}\\n # a"', "{text}\n # a"), ("'it''s {text}'", "it's {text}")]
)
def test_a_prompt_in_quotes_is_read_as_yaml(text: str, read: str, recipe_file: Path) -> None:
    assert load_recipe(recipe_file, [f"data.prompt={text}"]).data.prompt == read


def test_texts_of_other_fields_are_texts_too(recipe_file: Path) -> None:
    given = ["data.target=7", "data.source=[a] # b", "description=true", "published_source=null"]
    recipe = load_recipe(recipe_file, [*given, "data.prompt='{source}'"])
    assert (recipe.data.target, recipe.data.source) == ("7", "[a] # b")
    assert (recipe.description, recipe.published_source) == ("true", "null")
    labels = ["data.target=null", "data.label=summary", "data.labels.0=null", "data.labels.1=true"]
    assert load_recipe(recipe_file, labels).data.labels == {"0": "null", "1": "true"}
    assert load_recipe(recipe_file, labels).data.target is None
    assert mistakes(recipe_file, "data.name=") == ["  data.name: expected a valid string; got null"]


def test_three_mistakes_are_three_lines(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        "model: {name: m, devise: cpu}\ndata: {name: d, source: s, target: t}\ntraining: {epochs: many}\noptimizer: {learning_rate: -1}\n"
    )
    assert mistakes(file) == [
        "  model.devise: unknown key. Did you mean 'device'?",
        "  training.epochs: expected a valid integer; got 'many'",
        "  optimizer.learning_rate: expected greater than 0 or 'pilot'; got -1",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=4", "lora.rnak: unknown key. Did you mean 'rank'?"),
        ("training.epochs=1.5", "training.epochs: expected a valid integer; got 1.5"),
        ("training.epochs=0", "training.epochs: expected greater than 0; got 0"),
        ("training.seed=true", "training.seed: expected a valid integer or a list; got true"),
        ("lora.dropout=1.0", "lora.dropout: expected less than 1; got 1.0"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: expected a finite number or 'pilot'; got nan"),
        ("optimizer.schedule=liner", "optimizer.schedule: expected 'linear', 'cosine' or 'constant'; got 'liner'"),
        ("evaluation.metrics=[ruoge]", "evaluation.metrics: unknown metric 'ruoge'. Did you mean 'rouge'?"),
        ("evaluation.beams=0", "evaluation.beams: expected greater than 0; got 0"),
        ("evaluation.top_p=1.5", "evaluation.top_p: expected less than or equal to 1; got 1.5"),
        ("evaluation.top_p=0.9", "evaluation: top_p is 0.9, which means something only with sample: true"),
        ("evaluation.early_stopping=soon", "evaluation.early_stopping: expected False, True or 'never'; got 'soon'"),
        ("model.dtype=float16", "model.dtype: expected 'auto', 'float32' or 'bfloat16'; got 'float16'"),
        ("optimizer.schedule=linear # now", "optimizer.schedule: expected 'linear', 'cosine' or 'constant'; got 'linear # now'"),
        ("lora=3", "lora: expected a block of settings; got 3"),
        ("lora", "'lora': an override is written key=value, such as lora.rank=32"),
        ("lora.rank=[", "lora.rank: '[' is not a YAML value; put it in quotes"),
        (r'data.prompt="\d"', r"""data.prompt: '"\\d"' is not a YAML value; put it in single quotes"""),
        ("model.name.x=1", "model.name.x: 'name' holds the value 'some/model', not settings"),
        ("variants=[lora-9]", "variants: there is no variant 'lora-9'. Did you mean 'lora-8'?"),
        (
            "variants.lora-9.lora.rank=1",
            "variants.lora-9.lora.rank: there is no variant 'lora-9'. Did you mean 'lora-8'? A new one is given whole: "
            "'variants.lora-9={lora.rank: 1}'",
        ),
        ("variants.lora-8.lora.rnak=1", "variants.lora-8: lora.rnak: unknown key. Did you mean 'rank'?"),
        (
            "variants.lora-8.model.name.x=1",
            "variants.lora-8: model.name.x: 'name' holds the value 'some/model', not settings",
        ),
        (
            "published.lora-8.gflop=1",
            "published.lora-8 has the figure 'gflop'. Did you mean 'gflops'?",
        ),
        ("published.lora-9.rouge1=1", "published names the variant 'lora-9'. Did you mean 'lora-8'?"),
        ("nonsense.key=1", "nonsense: unknown key. There are: " + ", ".join(sorted(Recipe.model_fields)) + "."),
    ],
)  # fmt: skip
def test_each_mistake_says_what_was_got_and_what_is_expected(override: str, message: str, recipe_file: Path) -> None:
    assert mistakes(recipe_file, override) == [f"  {message}"]


def test_both_batch_sizes_are_a_mistake(recipe_file: Path) -> None:
    found = mistakes(recipe_file, "training.batch_size=4", "training.tokens_per_batch=512")
    assert found == ["  training: batch_size and tokens_per_batch are both given; set one of them to null"]
    assert load_recipe(recipe_file, ["training.batch_size=4"]).training.token_budget is None
    assert load_recipe(recipe_file).training.token_budget == 4096


def test_a_missing_block_and_a_missing_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {name: m}\ndata: {name: d}\n")
    assert mistakes(tmp_path / "a.yaml") == [
        "  data.source: missing; the recipe must give it",
        "  data.target: missing; name the column that the model learns to write, messages for a chat, label for classes, "
        "or an objective",
    ]


def test_disabled_is_another_word_for_full(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["lora.disabled=true"]).training.method == "full"
    assert load_recipe(recipe_file, ["lora.disabled=true", "training.method=full"]).training.method == "full"
    assert "lora.disabled is true" in mistakes(recipe_file, "lora.disabled=true", "training.method=lora")[0]


def test_a_variant_may_say_disabled_too(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["variants.full={lora.disabled: true}"])
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    for each in (recipe, load_recipe(tmp_path / "again.yaml")):
        assert [each.variant(name).training.method for name in each.variants] == ["none", "lora", "full"]


def test_variants_can_be_chosen_by_name(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["variants=[zero-shot]"])
    assert list(recipe.variants) == ["zero-shot"] and recipe.published == {}


def test_the_seed_of_lora_is_the_trainings_where_not_given(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["training.seed=7"]).spec().seed == 7
    assert load_recipe(recipe_file, ["training.seed=7", "lora.seed=3"]).spec().seed == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flan-t5-base-dialogsun", "Did you mean 'flan-t5-base-dialogsum'"),
        ("nowhere/x.yaml", "There is no recipe file nowhere/x.yaml"),
    ],
)
def test_an_unknown_recipe(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- a", "holds list, not a mapping"), ("a: 1\na: 2", "duplicate key")],
)
def test_a_file_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "x.yaml")


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe("flan-t5-base-dialogsum")
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.epochs = 2  # type: ignore[misc]


def test_the_schema_knows_every_key_and_its_meaning() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    for block in (
        "ModelSettings",
        "DataSettings",
        "TrainingSettings",
        "OptimizerSettings",
        "EvaluationSettings",
        "LoRASpec",
    ):
        for key, field in schema["$defs"][block]["properties"].items():
            assert field.get("description"), f"{block}.{key} has no description"
    data = schema["$defs"]["DataSettings"]
    assert data["required"] == ["name"] and data["anyOf"] == [{"required": ["source"]}, {"required": ["messages"]}]


def test_whole_texts_are_scored_by_their_loss(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["data.source=null", "data.prompt='{source}'"]).evaluation.metrics == ()
    (problem,) = mistakes(recipe_file, "data.source=null", "data.prompt='{source}'", "validation.metrics=[rouge]")
    assert problem == "  validation.metrics rouge: with data.source: null only the loss is measured"


def test_a_quantised_base_is_never_trained_whole(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, []).model.quantize is None
    assert load_recipe(recipe_file, ["model.quantize=none"]).model.quantize is None
    assert load_recipe(recipe_file, ["model.quantize=nf4"]).model.quantize == "nf4"
    (problem,) = mistakes(recipe_file, "model.quantize=int8", "training.method=full")
    assert problem.startswith("  model.quantize int8 stores weights that no step can change")
    (problem,) = mistakes(recipe_file, "model.quantize_except=[wo]")
    assert problem == "  model: quantize_except means something only with quantize: int8 or nf4"


def test_a_variant_that_trains_everything_does_not_inherit_a_quantised_base() -> None:
    tree: dict[str, Any] = {
        "name": "example",
        "model": {"name": "t5-small", "quantize": "int8", "quantize_except": ["wo"]},
        "data": {"name": "d", "source": "a", "target": "b"},
        "variants": {"full": {"training.method": "full"}, "lora": {"lora.rank": 2}},
    }
    recipe = recipe_from_tree(tree, [], "example")
    assert recipe.variant("full").model.quantize is None and recipe.variant("full").model.quantize_except == ()
    assert recipe.variant("lora").model.quantize == "int8" and recipe.variant("lora").model.quantize_except == ("wo",)


@pytest.mark.parametrize("name", ["../victim", "..", ".", "''", "a/b", "/abs", "'a\\b'"])
def test_names_of_runs_stay_in_their_folder(name: str, recipe_file: Path) -> None:
    for override, key in ((f"name={name}", "name"), (f"variants={{{name}: {{}}}}", "variants")):
        (problem,) = mistakes(recipe_file, override, "published={}")
        assert problem.startswith(f"  {key}: ") and "is to be the name of a folder" in problem


def test_a_seed_is_given_once(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["training.seed=[1, 2]"]).training.seeds == (1, 2)
    (problem,) = mistakes(recipe_file, "training.seed=[1, 2, 1]")
    assert problem == "  training.seed: one seed stands there twice; name each once; got [1, 2, 1]"


def test_the_designs_example_resolves() -> None:
    tree: dict[str, Any] = {
        "name": "example",
        "model": {"name": "google/flan-t5-base", "engine": "torch", "device": "auto", "dtype": "auto", "quantize": "none"},
        "data": {"name": "knkarthick/dialogsum", "source": "dialogue", "target": "summary", "max_target_length": "p90"},
        "lora": {"rank": 16, "alpha": 32, "rules": ["q", "v"], "dropout": 0.05, "tune_vectors": False, "disabled": False},
        "training": {"method": "lora", "epochs": 1, "batch_size": None, "tokens_per_batch": 4096, "seed": 42},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.0, "schedule": "linear", "max_grad_norm": 1.0},
        "evaluation": {"split": "test", "max_new_tokens": 200, "beams": 1, "metrics": ["rouge"]},
        "variants": {"zero-shot": {"training.method": "none"}, "full": {"training.method": "full", "optimizer.learning_rate": 1e-4}},
    }  # fmt: skip
    assert recipe_from_tree(tree, [], "example").variant("full").optimizer.learning_rate == 1e-4
