"""Commands about a trained adapter: predict with it, export it for other tools, serve it for trying."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privet.client.pages.html import visible
from privet.common.errors import DataError, StudyError
from privet.common.options import FormatFile, Json, RunPath, require_files
from privet.common.progress import Stages, closing, doing

if TYPE_CHECKING:
    from privet.client.release.generation import Sampling
    from privet.client.training.host import ModelHost
    from privet.common.study.study import Study

_LABELS_SHOWN = 10


@doing("Loading the adapter of {run} and its base")
def predict(
    run: RunPath,
    text: Annotated[
        list[str] | None, typer.Option(help="A text, sentence or prompt. Give the option once for each.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A file of texts: CSV, JSON Lines or Parquet. It needs no labels.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --data: new file for the results (.jsonl or .csv). Default: JSON Lines to the screen."),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="With --data: name of the column with the texts. Default: that of the study's data.columns."),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option("--id", help="With --data: keep this column of each row. Default: keep all columns."),
    ] = None,
    form: FormatFile = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="Temperature of generated answers. 0: always the most probable token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Probability mass of the most probable tokens to draw from.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of an answer. Default: task.max_new_tokens of the study."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws, for a temperature above 0.")] = 0,
    counts: Annotated[
        Path | None,
        typer.Option(
            help="With --data: directory in which this site counts predictions. It is made.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference", help="With --counts: keep the file's counts as that with which later ones compare."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Apply a trained adapter: classify texts, tag their words, or answer prompts.

    RUN is a run directory, or the directory of a release. With --data, every row of the file gets one result, in the
    order of the file. Rows without text get an empty result with a reason. Answers stream to a terminal.
    """
    if bool(text) == (data is not None):
        raise StudyError(
            f"expected either --text or --data, got {'both' if text else 'neither'}",
            'give a text with `privet predict RUN --text "…"`, or a file with `privet predict RUN --data FILE`',
        )
    belonging = {"--out": out, "--column": column, "--id": id_column, "--format": form, "--counts": counts}
    given = [name for name, value in belonging.items() if value is not None]
    if text and given:
        raise StudyError(
            f"{' and '.join(given)}: expected --data beside it, got --text",
            "give a file with `privet predict RUN --data FILE`",
        )
    if reference and counts is None:
        raise StudyError(
            "--reference: expected --counts beside it", "name a directory: `privet predict RUN --counts DIRECTORY`"
        )
    require_files([] if data is None else [data], "--data")
    from privet.client.release.opened import caution, mounted, open_release

    release = open_release(run)
    from privet.client.release.generation import Sampling  # PyTorch, which takes seconds

    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    if note := caution(release):
        typer.echo(note, err=True)
    if data is not None:
        from privet.client.formats import FileFormat, load_format
        from privet.client.release.applied import look, predict_file, wanted_columns
        from privet.client.release.monitoring import Monitor, keep_reference, reference_file
        from privet.client.training.proposals import with_settings

        written = FileFormat() if form is None else load_format(form).of(data)
        try:
            found, began = look(data, release.study, column, id_column, written), time.monotonic()
        except DataError as error:
            wanted = wanted_columns(release.study, column)
            raise with_settings(error, [data] if form is None else [], wanted) from None
        name = _name_of(run)
        # A reference is counted by itself, in memory: it is no part of what the adapter is used for.
        monitor = Monitor.of({name: release}, None if reference else counts)
        if reference and counts is not None:
            reference_file(counts, name)  # before hours of work, not after
        with monitor.kept(always=False), mounted(release, scoring=False) as host, Stages(quiet=as_json) as stages:

            def tell(done: int) -> None:
                stages.tell("predicting rows", done, found.rows)

            empty = predict_file(
                host, release.study, data, found, out, sys.stdout, tell, sampling, written, monitor[name]
            )
        if reference and counts is not None:
            typer.echo(f"reference: {keep_reference(counts, name, monitor[name])}", err=True)
        lacking = f"; {empty} rows have a reason instead of a result" if empty else ""
        took = time.monotonic() - began
        done = f"predicted {found.rows - empty} of {found.rows} rows in {took:.1f} s{lacking}"
        same = "" if form is None else f" --format {quote(str(form))}"
        command = f"`privet evaluate {quote(str(run))} --data {quote(str(data))}{same}`"
        typer.echo(closing(done, f"with labels in the file, measure it with {command}", err=True), err=True)
        return
    assert text is not None  # noqa: S101 - narrows the type; checked above
    with mounted(release, scoring=False) as host:
        if release.study.task.generates and sys.stdout.isatty() and not as_json:
            _stream_to_terminal(host, release.study, text, sampling)
            return
        from privet.client.release.applied import predict as predicted

        results = predicted(host, release.study, text, sampling)
    if as_json:
        typer.echo(json.dumps(results))
        return
    for result in results:
        typer.echo(visible(_readable(result)))


def _name_of(run: Path) -> str:
    """Return the name of a run directory, also where its release is given."""
    path = run.resolve()
    return path.parent.name if path.name == "release" else path.name


def _stream_to_terminal(host: ModelHost, study: Study, texts: list[str], sampling: Sampling) -> None:
    from privet.client.release.applied import prompt_of
    from privet.client.release.generation import stream

    for text in texts:
        # A terminal obeys control characters, and a model writes whatever it was taught.
        ids = prompt_of(host, study, text)
        stream(host, study, ids, sampling, lambda piece: typer.echo(visible(piece), nl=False))
        typer.echo()


def _readable(result: dict[str, Any]) -> str:
    if "probabilities" in result:
        best = sorted(result["probabilities"].items(), key=lambda item: -item[1])
        shown = [f"{label} {100 * probability:.1f} %" for label, probability in best[:_LABELS_SHOWN]]
        more = len(best) - len(shown)
        return "   ".join([*shown, *([f"and {more} less probable label{'s'[: more != 1]}"] if more else [])])
    if "tags" in result:
        return " ".join(
            f"{w}/{tag}" if tag != "O" else w for w, tag in zip(result["words"], result["tags"], strict=True)
        )
    return str(result["answer"]) if "answer" in result else f"no result: {result['reason']}"


@doing("Exporting the adapter of {run} to {out}")
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="New directory for the export. It must not exist.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="peft (the adapter alone), merged (all weights), gguf (llama.cpp, Ollama) or sentence-transformers. "
            "Default: sentence-transformers for text classifiers, else merged.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="For merged: type of the weights, fp32, bf16 or fp16. Logits are exact in fp32 only.")
    ] = "fp32",
    as_json: Json = False,
) -> None:
    """Export a trained adapter for other tools, and prove that they compute the same.

    The directory holds weights or adapter, tokenizer, chat template, generation settings, model card, licence of the
    base and the study. It is loaded with plain libraries, and its logits are compared with those of the adapter. An
    export that differs is deleted.
    """
    from privet.client.release.opened import caution, open_release

    release = open_release(run)
    from privet.client.release.exports import default_format, export_release

    if note := caution(release):
        typer.echo(note, err=True)
    chosen = form or default_format(release.study)
    proof = export_release(release, out, chosen, dtype, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(proof))
        return
    share = " of the largest logit" if proof["relative"] else ""
    typer.echo(
        f"{out}: {chosen}, largest difference of logits {proof['largest_difference']:.2g}{share} on {proof['inputs']} "
        f"inputs (bound {proof['bound']:g})"
    )
    typer.echo(f"next: read {out / 'README.md'}, which says how to load it")


@doing("Loading {runs} and their base")
def serve(
    runs: Annotated[list[Path], typer.Argument(help="Run directories or releases, all of one base.", metavar="RUN...")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port number on 127.0.0.1. 0: any free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the token that clients send, readable by its owner alone. Default: a new token."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    queue: Annotated[int, typer.Option(min=0, help="Most requests that wait; further ones are refused.")] = 8,
    counts: Annotated[
        Path | None,
        typer.Option(help="Directory that keeps the counts of answers. It is made. Default: they end with the server."),
    ] = None,
) -> None:
    """Serve adapters on this machine, for trying them with any client of OpenAI's API.

    It listens on 127.0.0.1 alone, and asks for a bearer token. Each run is a model by its directory's name; the base
    alone is the model `base`. One answer is generated at a time. Prompts and answers are not logged. GET /metrics
    gives counts for Prometheus. Stop it with Ctrl-C.
    """
    from privet.client.release.opened import caution, open_release
    from privet.client.repeating import repeating
    from privet.client.site import Resources

    opened = [open_release(path) for path in runs]
    from privet.client.release.monitoring import Monitor, saving

    try:
        from privet.client.release.served import BASE, Endpoint, Limits, Models
        from privet.client.release.server import new_token, read_token
        from privet.client.release.server import serve as answer
        from privet.common.web.serving import listen
    except ModuleNotFoundError as error:
        raise StudyError(f"serving needs the package {error.name}", "run pip install 'privet[serve]'") from None
    names = [_name_of(path) for path in runs]
    if len({*names, BASE}) <= len(names):
        raise StudyError(
            f"expected directories with different names, none of them `{BASE}`, got {', '.join(names)}",
            "rename or link a directory, so that each model has its own name",
        )
    token = new_token() if token_file is None else read_token(token_file)
    releases = dict(zip(names, opened, strict=True))
    for note in filter(None, map(caution, releases.values())):
        typer.echo(note, err=True)
    monitor = Monitor.of(releases, counts, base=BASE)
    socket = listen(port)
    endpoint = Endpoint(Models(releases, Resources()), token, Limits(waiting=queue, tokens=max_tokens), monitor)

    def ready(address: str) -> None:
        typer.echo(f"address  {address}")
        typer.echo(f"models   {', '.join([*names, BASE])}")
        typer.echo(f"token    {token if token_file is None else f'that in {token_file}'}")
        sys.stdout.flush()

    with monitor.kept(), repeating("counts", lambda: saving(monitor)):
        answer(endpoint, socket, ready)
