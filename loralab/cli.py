"""The command line: parse and call, nothing else. A mistake of the user's is one message on stderr and exit code 2; an error
that nobody foresaw is one too, with a file that holds the traceback, and exit code 70 (console/crash.py)."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from loralab.console import crash
from loralab.errors import LoralabError, Stopped

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="loralab",
    help="LoRA fine-tuning, with an honest number for what it bought.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"loralab {version('loralab')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """LoRA fine-tuning, with an honest number for what it bought."""


RecipeName = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of a shipped one.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="FILE", help="Your own .csv, .tsv, .jsonl, .json, .parquet or folder; needs no RECIPE."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as lora.rank=32.")
]
Trained = Annotated[Path, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="A folder, a hub id, or embedded:tiny-t5.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The new folder; default: the next free runs/NAME.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out, or with the run that RECIPE names.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; all else goes to stderr.")]
Base = Annotated[str | None, typer.Option("--base", metavar="NAME", help="The base model, where it has moved.")]


@app.command()
def train(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    data: Data = None,
    out: Out = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe, or on --data FILE without one, and evaluate.

    Example: loralab train t5-small-xsum lora.rank=32 --out runs/rank-32
    """
    from loralab.evaluation.scores_in_words import run_summary
    from loralab.runs.arguments import recipe_and_folder
    from loralab.training.train import train as run

    settings, folder = recipe_and_folder("train", recipe, overrides or [], data, out, resume)
    folder, record = run(settings, folder, resume)
    keys = ("steps", "tokens_per_second", "seconds", "forgetting")
    result = {"run": str(folder), "adapter": record.get("saved"), "metrics": record["metrics"]}
    result |= {key: record.get(key) for key in keys}
    _finish(result, as_json, f"{run_summary(record)}\nTry it: loralab generate {shlex.quote(str(folder))} --text '...'")


@app.command()
def compare(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    data: Data = None,
    out: Out = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Run every variant of a recipe; one table compares them.

    Example: loralab compare flan-t5-base-dialogsum data.max_train_rows=1000
    """
    from loralab.experiments.compare import compare as run
    from loralab.reports.summary import report
    from loralab.runs.arguments import recipe_and_folder

    settings, folder = recipe_and_folder("compare", recipe, overrides or [], data, out, resume)
    results = run(settings, folder, resume)
    _finish(results, as_json, report(results))
    if any(row.get("failed") for row in results["rows"]):
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take real steps on random weights, and compare.")] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of the machine; with --measure or --tokens-per-second.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="Of an earlier run, for the hours of this one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe will cost and whether it fits, without weights.

    Example: loralab plan flan-t5-xxl-samsum
    """
    from loralab.planning.plan import PlanOptions
    from loralab.planning.plan import plan as foresee
    from loralab.planning.report import report
    from loralab.runs.arguments import recipe_and_folder

    settings, _ = recipe_and_folder("plan", recipe, overrides or [], None, None, False)
    found = foresee(settings, PlanOptions(measure, price_per_hour, tokens_per_second))
    _finish(found, as_json, report(found))


@app.command()
def evaluate(trained: Trained, overrides: Overrides = None, base: Base = None, as_json: AsJson = False) -> None:
    """Score a run or an adapter, on its own data or other.

    Example: loralab evaluate runs/rank-32/adapter evaluation.split=validation
    """
    from loralab.evaluation.scores_in_words import scores_in_words
    from loralab.inference.saved_model import evaluate_saved

    row = evaluate_saved(trained, overrides or [], base)
    _finish(row, as_json, scores_in_words(row))


@app.command()
def score(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="A .csv, .tsv, .jsonl, .json or .parquet with predictions, or a run's folder."
        ),
    ],
    prediction: Annotated[
        list[str] | None,
        typer.Option(
            "--prediction",
            "--predictions",
            metavar="COLUMN",
            help="A system's column; may be repeated. Default: prediction, or all that start so.",
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="May be repeated. Default: references, reference, target or summary."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="What the predictions were made from. Default: source.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Rows with the same value share a source. Default: the source, or found."),
    ] = None,
    metrics: Annotated[str, typer.Option(help="Separated by commas, such as rouge,chrf: those of recipes.")] = "rouge",
    as_json: AsJson = False,
) -> None:
    """Score predictions in files, and compare their systems.

    Example: loralab score answers.csv --prediction base --prediction lora
    """
    from loralab.evaluation.prediction_files import Columns
    from loralab.evaluation.score_files import report, score_files

    columns = Columns(prediction or (), reference or (), source, group)
    results = score_files(files, columns, metrics.split(","))
    _finish(results, as_json, report(results))


@app.command()
def generate(
    trained: Trained,
    overrides: Overrides = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="What to answer, without the prompt; may be repeated.")
    ] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option("--text-pair", help="The second text of each, for a classifier of pairs.")
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="FILE", help=".jsonl, .csv, … with the source column, .txt or - with a text a line."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A new .jsonl or .csv: the input's rows with a column prediction."),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample", metavar="SPLIT[:ROW]", help="Answer a random row of a split, or that row, beside its reference."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer; default: the recipe's.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="Ends an answer, which is cut before it; \\n in it is a line break. May be repeated.",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw from the likeliest tokens of this probability; 1 from all."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws, and of --sample's row.")] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Answer texts with a trained model, or with a base.

    The texts are those of the options, stdin as one text, or what you type.

    How else it writes are overrides: evaluation.beams=4, evaluation.repetition_penalty=1.2, and the like.

    Example: loralab generate runs/rank-32 --text "Tom: Lunch? Ann: At one."
    """
    from loralab.inference.generate import GenerateRequest, run_request

    question = GenerateRequest(text or (), input, out, sample, as_json, seed, text_pair or ())
    result, words = run_request(trained, question, overrides or [], base, max_new_tokens, stop or (), top_p)
    if as_json or words is not None:
        _finish(result, as_json, words or "")


@app.command()
def merge(
    trained: Trained,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new model's folder.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one model for Transformers.

    Example: loralab merge runs/rank-32 --out merged
    """
    from loralab.inference.saved_model import merge_saved

    dtype = merge_saved(trained, out, base)
    _finish(
        {"model": str(out), "dtype": dtype},
        as_json,
        f"{out} is a plain model in {dtype}, as the base is stored: Transformers' from_pretrained({str(out)!r}) loads it.",
    )


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What to look through.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List runs, their scores, and how a stopped one goes on.

    Example: loralab runs
    """
    from loralab.runs import listing as below

    listed = below.list_runs(folder)
    _finish(below.as_json(listed, folder), as_json, below.report(listed, folder))


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes.

    Example: loralab recipes
    """
    from loralab.config.loading import load_recipe, shipped_recipes

    lines = {name: load_recipe(name).description for name in shipped_recipes()}
    width = max(map(len, lines))
    _finish(lines, as_json, "\n".join(f"{name:<{width}}  {description}" for name, description in lines.items()))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors.

    Example: loralab schema > recipe.schema.json
    """
    from loralab.config.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


def _finish(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text)


def _of_the_system(error: OSError) -> str | None:
    """Returns what the system refused, where it is about a file or a full disk; None of any other error."""
    if error.errno in FULL:
        return f"the disk is full ({error}). Make room; a run goes on with --resume."
    if error.filename is None:
        return None
    return f"{error.filename}: {error.strerror}. Give another path, or mend what stands there."


def _run() -> int:
    """Runs the command; returns the exit code, which docs/guide.md lists."""
    try:
        return _call()
    except LoralabError as error:
        print(f"loralab: {error}", file=sys.stderr)
        return 130 if isinstance(error, Stopped) else 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if (told := _of_the_system(error)) is None:
            return crash.report_crash(error)
        print(f"loralab: {told}", file=sys.stderr)
        return 2
    except Exception as error:
        return crash.report_crash(error)


def _call() -> int:
    """Parses the words and calls the command; after an unknown option says which setting was meant."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        print("Aborted!", file=sys.stderr)
        return 1
    except Exception as error:
        if (show := getattr(error, "show", None)) is None:  # no mistake in the command line
            raise
        show()
        from loralab.config.other_names import suggestion

        if (option := getattr(error, "option_name", None)) and (instead := suggestion(option)):
            value = "" if "=" in instead or instead.startswith("--") else "=VALUE"
            print(f"Did you mean {instead}{value}? Settings are given as KEY=VALUE, without dashes.", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a termination ends things as Ctrl-C does
    sys.exit(_run())
