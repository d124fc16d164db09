"""The command line: `hf-modular`, or `python -m hf_modular.cli`.

Commands only pass their arguments on; what they do is in the library. Exit codes: 0 done, 1 a check failed, 2 the call
or its input is wrong.
"""

import atexit
import gc
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Adapter types and model merging for PEFT and transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="A recipe, in mergekit's YAML format.")],
    output: Annotated[Path, typer.Argument(help="A folder that is absent or empty.")],
    seed: Annotated[int | None, typer.Option(help="For random methods; the recipe's by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many work at a time; as many as cores by default.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest file of weights.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder.")] = False,
    hashes: Annotated[bool, typer.Option(help="Note the SHA-256 of all weights in the report.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same merge was killed.")] = False,
    verify: Annotated[bool, typer.Option(help="Read the result again, and keep it only if it is right.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done; write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge models into a folder that transformers loads."""
    from hf_modular.merging import merge as run
    from hf_modular.merging import plan_merge
    from hf_modular.merging.engine._processes import processes

    what: Any = {"seed": seed, "device": device, "workers": workers, "max_shard_size": max_shard_size}
    if dry_run:
        plan = plan_merge(recipe, output, overwrite=overwrite or resume, **what)
        typer.echo(plan.to_json() if as_json else plan.summary())
        return
    with warnings.catch_warnings(), _interrupts_explained():
        warnings.simplefilter("ignore")  # the report has the same notes
        report = run(
            recipe,
            output,
            **what,
            overwrite=overwrite,
            hashes=hashes,
            resume=resume,
            verify=verify,
            progress=not (quiet or as_json),
        )
    if not processes().first:
        return
    if as_json:
        typer.echo(report.to_json())
    elif not quiet:
        typer.echo(f"{report.summary()}: {output}")


@app.command("merge-adapters")
def merge_adapters(
    recipe: Annotated[Path, typer.Argument(help="A recipe like those of `merge`, with adapters as its models.")],
    output: Annotated[Path, typer.Argument(help="A folder that is absent or empty.")],
    seed: Annotated[int | None, typer.Option(help="For random methods; the recipe's by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge adapters into a folder that PEFT loads: into one, or with `merge_method: rmm` each to be had back."""
    from hf_modular.adapter_merging import merge_adapter_files

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says how near the result is
        report = merge_adapter_files(recipe, output, seed=seed, overwrite=overwrite)
    if as_json:
        typer.echo(report.to_json())
    elif not quiet:
        typer.echo(f"{report.summary()}: {output}")


@app.command()
def inspect(
    reference: Annotated[str, typer.Argument(help="A model or an adapter, as a folder or a name of the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a checkpoint or an adapter holds; exit code 1 if something is not as it should be."""
    from hf_modular.inspection import inspect as run

    found = run(reference)
    typer.echo(found.to_json() if as_json else found.summary())
    if found.problems:
        raise typer.Exit(1)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="An adapter or a model checkpoint.")],
    license: Annotated[str | None, typer.Option(help="The licence, as the Hub spells it.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The Hub id of an adapter's base model.")] = None,
) -> None:
    """Write the folder's model card, README.md."""
    from hf_modular.cards import save_card

    typer.echo(save_card(folder, **_given(license=license, base_model=base_model)))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An adapter or a model checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="The repository; it is created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; it is created if it does not exist.")] = None,
    license: Annotated[str | None, typer.Option(help="The licence, as the Hub spells it.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The Hub id of an adapter's base model.")] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="I have read the parents' differing licences.")
    ] = False,
) -> None:
    """Publish a folder on the Hub with a model card, in one commit, as whom `hf auth login` or HF_TOKEN says."""
    from hf_modular.hub import push_to_hub

    facts = _given(license=license, base_model=base_model)
    commit = push_to_hub(folder, repo_id, private=private, revision=revision, accept_license=accept_license, **facts)
    typer.echo(commit.commit_url)


def _given(**options: Any) -> Any:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    family: Annotated[str | None, typer.Option(help="Only `merge` or only `adapter`.")] = None,
) -> None:
    """List all adapters and merge methods with their settings."""
    from hf_modular import _listing

    sources = {"adapter": _listing.adapter_methods, "merge": _listing.merge_methods}
    if family is not None and family not in sources:
        raise ValueError(f"--family must be one of {list(sources)}, but got {family!r}")
    found = {name: listed() for name, listed in sources.items() if family in (None, name)}
    if as_json:
        typer.echo(json.dumps([method.to_dict() for family in found.values() for method in family], indent=2))
        return
    for name, group in found.items():
        typer.echo(f"{name.capitalize()} methods\n")
        typer.echo("\n\n".join("\n".join(method.lines()) for method in group) + "\n")


@app.command()
def fisher(
    model: Annotated[str, typer.Argument(help="A model or an adapter, as a folder or a name of the Hub.")],
    dataset: Annotated[str, typer.Argument(help="A data file, a saved data set, or a name of the Hub.")],
    output: Annotated[Path, typer.Argument(help="A folder that is absent or empty.")],
    split: Annotated[str, typer.Option(help="Which part of the data set.")] = "train",
    text: Annotated[list[str], typer.Option(help="The column of the text; twice for a pair of texts.")] = ["text"],  # noqa: B006
    label: Annotated[str, typer.Option(help="The column of the labels, if there is one.")] = "label",
    tokens: Annotated[bool, typer.Option("--tokens", help="The data set has tokens already.")] = False,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.", min=1)] = 128,
    examples: Annotated[int, typer.Option(help="How many, drawn by the seed.", min=1)] = 4096,
    labels: Annotated[str, typer.Option(help="auto, expected, sampled or given.")] = "auto",
    include: Annotated[str, typer.Option(help="Only parameters whose names match this regular expression.")] = "",
    merged: Annotated[bool, typer.Option("--merged", help="Of the model with the adapter merged into it.")] = False,
    batch_size: Annotated[int, typer.Option(help="Examples at once.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="For the choice of examples and for sampled labels.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for square roots in half the space.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to compute; `auto` for each process's own.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Compute a model's Fisher information on texts, for `merge_method: fisher`; also under `accelerate launch`."""
    from hf_modular.fisher import fisher_information
    from hf_modular.fisher._loading import load_model, load_texts

    columns = [] if tokens else text
    rows = load_texts(dataset, split, model, columns, label=label, max_length=max_length, examples=examples, seed=seed)
    options: Any = {"labels": labels, "dtype": dtype}
    fisher_information(
        load_model(model, device),
        rows,
        output,
        include=include,
        merged=merged,
        batch_size=batch_size,
        seed=seed,
        progress=not quiet,
        overwrite=overwrite,
        **options,
    )
    if not quiet:
        typer.echo(f"the Fisher information on {len(rows)} examples is in {output}")


@app.command()
def activations(
    model: Annotated[str, typer.Argument(help="A model, as a folder or a name of the Hub.")],
    dataset: Annotated[str, typer.Argument(help="A data file, a saved data set, or a name of the Hub.")],
    output: Annotated[Path, typer.Argument(help="A folder that is absent or empty.")],
    split: Annotated[str, typer.Option(help="Which part of the data set.")] = "train",
    text: Annotated[list[str], typer.Option(help="The column of the text; twice for a pair of texts.")] = ["text"],  # noqa: B006
    tokens: Annotated[bool, typer.Option("--tokens", help="The data set has tokens already.")] = False,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.", min=1)] = 128,
    examples: Annotated[int, typer.Option(help="How many, drawn by the seed.", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(help="Examples at once.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="For the choice of examples.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where to compute; `auto` for the accelerator if there is one.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder.")] = False,
) -> None:
    """Measure the inputs of a model's linear layers on texts, for `merge_method: dare` with `mask: wanda`."""
    from hf_modular.calibration import activation_norms
    from hf_modular.fisher._loading import load_model, load_texts

    columns = [] if tokens else text
    rows = load_texts(dataset, split, model, columns, label=None, max_length=max_length, examples=examples, seed=seed)
    activation_norms(load_model(model, device), rows, output, batch_size=batch_size, overwrite=overwrite)
    typer.echo(f"the sizes of the activations on {len(rows)} examples are in {output}")


@app.command()
def search(
    recipe: Annotated[Path, typer.Argument(help="A recipe, in mergekit's YAML format.")],
    output: Annotated[Path, typer.Argument(help="A folder for the best recipe and the trials.")],
    vary: Annotated[list[str], typer.Option(help="What, such as weight=0:2, models.0.density=0.1:1 or t=0,1.")],
    dataset: Annotated[str | None, typer.Option(help="A data file, a saved data set, or a name of the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Which part of it; not the test data.")] = "validation",
    text: Annotated[list[str], typer.Option(help="The column of the text; twice for a pair of texts.")] = ["text"],  # noqa: B006
    label: Annotated[str, typer.Option(help="The column of the labels.")] = "label",
    max_length: Annotated[int, typer.Option(help="Tokens of a text.", min=1)] = 128,
    examples: Annotated[int, typer.Option(help="How many, drawn by the seed.", min=1)] = 1024,
    metric: Annotated[str, typer.Option(help="accuracy, loss, or what evaluate.load takes, whose code it runs.")] = (
        "accuracy"
    ),
    command: Annotated[str | None, typer.Option(help="Instead: a program with {model}, printing the score.")] = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="Smaller scores are better.")] = False,
    budget: Annotated[int, typer.Option(help="How many models are merged and evaluated.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the search and the choice of examples.")] = 0,
    device: Annotated[str, typer.Option(help="Where models are merged: cpu, cuda, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Find the coefficients or settings with which a merge is best; goes on where it was stopped."""
    from hf_modular.searching import Command, Validation
    from hf_modular.searching import search as run
    from hf_modular.searching._space import parsed
    from hf_modular.searching._validation import load_metric, load_rows

    if (dataset is None) == (command is None):
        raise ValueError("a search needs --dataset or --command, and not both")
    evaluate: Any = Command(command) if command is not None else None
    if dataset is not None:
        rows = load_rows(
            recipe, dataset, split, text, label=label, max_length=max_length, examples=examples, seed=seed
        )
        evaluate = Validation(rows, load_metric(metric))
    options: Any = {"budget": budget, "seed": seed, "maximize": not minimize, "device": device, "progress": not quiet}
    report = run(recipe, evaluate, output, space=parsed(vary), **options)
    if not quiet:
        typer.echo(f"{report.summary()}: {output / 'best_recipe.yaml'}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A folder that is absent, empty or of an earlier demo.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Of the training, and the first of random merges.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps on two tasks; the figures mean nothing.")
    ] = False,
) -> None:
    """Train adapters on handwritten digits, merge models and compare; takes a few minutes on two cores."""
    from hf_modular.demo.run import run

    text = run(output, seed=seed, quick=quick, say=lambda news: typer.echo(news, err=True))
    typer.echo(f"\n{text}\n\nModels, cards, results.json and chart.png are in {output}")


@contextmanager
def _interrupts_explained() -> Iterator[None]:
    """After Ctrl-C say what is left, of which the library's exception tells."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        for note in getattr(interrupt, "__notes__", []):
            typer.echo(note, err=True)
        raise


def main() -> None:
    """Run the command line; what is wrong with an input is one message, not a traceback."""
    # a quarter of the time of a process that imports torch goes into looking for garbage, and most of that at its end
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
