"""The `cskv` command: each subcommand reads its options, calls the library, and says what came of it.

What most subcommands do not need, and takes long to load, is imported by those that do.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from .adapter_files import ADAPTER, check_adapter_files, write_adapter
from .cache import CSKVCache
from .config import CSKVConfig
from .files import check_out, replace_directory
from .fit_report import format_evaluation, format_report
from .fitting import fit as fit_model
from .fitting import probing_file
from .generation import has_active_adapter
from .kernels import HAS_TRITON, cpu
from .loading import load, local_adapter
from .pushing import push_folder
from .runs import check_same_run, file_fingerprint, forget_run, remember_run
from .texts import calibration_samples, documents, full_rows

EVALUATION_LENGTH, EVALUATION_ROWS = 512, 64  # of `cskv fit --evaluate`
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


def check_dtype(dtype: str) -> str:
    """Refuse what transformers would fail on with a traceback."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got '{dtype}'.")
    return dtype


def check_device_map(device_map: str | None) -> str | None:
    """Refuse a GPU that is not there."""
    if device_map is not None and device_map.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"'{device_map}' needs a GPU that torch can use, and there is none.")
    return device_map


DeviceMap = Annotated[
    str | None,
    typer.Option(help="As in from_pretrained; 'auto' fits models larger than the GPU.", callback=check_device_map),
]
DType = Annotated[str, typer.Option(help="As in from_pretrained.", callback=check_dtype)]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    help="Shrink the KV cache of a Hugging Face language model.",
)


@app.callback()
def main() -> None:
    """Shrink the KV cache of a Hugging Face language model."""


def refused(ctx: typer.Context, error: Exception) -> typer.BadParameter:
    """The library's message as one of the command line, where the argument ``base_model`` is ``--base-model``."""
    options = {param.name: param.opts[0] for param in ctx.command.params if param.param_type_name == "option"}
    return typer.BadParameter(re.sub(r"(?<=`)\w+(?=[`=])", lambda name: options.get(name[0], name[0]), str(error)))


@app.command()
def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("cskv-demo"),
    records: Annotated[
        int, typer.Option(min=1, help="Records to ask 8 questions about; more narrow the interval.")
    ] = 30,
) -> None:
    """Fit the bundled model, generate with full and compressed cache, measure both."""
    from .demo.run import run_demo

    try:
        run_demo(out, records, typer.echo)
    except (ValueError, OSError, ImportError) as error:
        raise refused(ctx, error) from error


@app.command()
def fit(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Model id or directory.")],
    data: Annotated[Path, typer.Option(help="Text file, or JSON lines with a 'text' field, to calibrate on.")],
    out: Annotated[Path, typer.Option(help="Directory for the adapter.")],
    compression: Annotated[float, typer.Option(help="Fraction of the KV bytes of old tokens to remove.")] = 0.8,
    key_layout: Annotated[str, typer.Option(help="'head', 'joint' or 'group:N'.")] = "head",
    init: Annotated[str, typer.Option(help="'attention', 'mse', 'asvd', 'svd' or 'random'.")] = "attention",
    bits: Annotated[
        int | None, typer.Option(help="Bits per latent, on average: 16, 8, 4, 3 or 2. Default: what each is worth.")
    ] = None,
    allocation: Annotated[str | None, typer.Option(help="'auto' or 'uniform' over the layers.")] = None,
    rank_multiple: Annotated[
        int, typer.Option(min=1, help="Give channels their bits in multiples; 4 for Hopper GPUs.")
    ] = 1,
    window: Annotated[int, typer.Option(help="Most recent tokens kept exactly.")] = 32,
    sinks: Annotated[int, typer.Option(help="First tokens kept exactly.")] = 4,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Calibration tokens, to whole samples; read twice counts twice.")
    ] = 65536,
    length: Annotated[int, typer.Option(min=1, help="Tokens per calibration sample, before recall.")] = 2048,
    recall: Annotated[
        bool, typer.Option(help="Read a part of each sample twice, which keeps what retrieval reads.")
    ] = True,
    device_map: DeviceMap = None,
    dtype: DType = "auto",
    evaluate: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text: measure perplexity, KL and agreement on it, and record them in the adapter."
        ),
    ] = None,
) -> None:
    """Fit an adapter to MODEL in closed form and save it.

    An interrupted fit goes on from the statistics that it saved last, some seconds before, or from the last layer
    whose worth was measured, when started again with the same --out. An adapter in --out stays until the new one is
    complete, and whatever else is there stays.
    """
    from .evaluate.divergence import evaluation_record

    try:
        check_out(out)
        config = CSKVConfig(
            compression=compression,
            key_layout=key_layout,
            init=init,
            bits=bits,
            allocation=allocation,
            rank_multiple=rank_multiple,
            window=window,
            sinks=sinks,
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        samples = calibration_samples(data, tokenizer, length)
        source = f"{data.name}, sha256 {file_fingerprint(data)}, {length} tokens a sample"
        held_out = None if evaluate is None else torch.stack(full_rows(evaluate, tokenizer, EVALUATION_LENGTH))
        out.parent.mkdir(parents=True, exist_ok=True)
        state_file = out.with_name(out.name + ".statistics.safetensors")
        base = AutoModelForCausalLM.from_pretrained(model, device_map=device_map, dtype=dtype)
        fitted = fit_model(
            base, samples, config, max_tokens=max_tokens, recall=recall, state_file=state_file, source=source
        )
        config = fitted.peft_config["default"]
        if held_out is not None:
            config.fit_report["evaluation"] = evaluation_record(fitted, held_out[:EVALUATION_ROWS], evaluate.name)
        typer.echo(format_report(config))
        if evaluate is not None:
            typer.echo(format_evaluation(config.fit_report["evaluation"]))
        replace_directory(out, lambda folder: write_adapter(folder, fitted, tokenizer, str(out)))
    except (ValueError, OSError, SafetensorError) as error:
        raise refused(ctx, error) from error
    os.remove(state_file)
    probing_file(state_file).unlink(missing_ok=True)
    typer.echo(f"\nsaved the adapter in {out}")


@app.command()
def train(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Directory or Hub id of a fitted adapter.")],
    data: Annotated[Path, typer.Option(help="Text file, or JSON lines with a 'text' field, to train on.")],
    out: Annotated[Path, typer.Option(help="Directory for the trained adapter.")],
    model: Annotated[str | None, typer.Option(help="Base model, if not the one the adapter names.")] = None,
    objective: Annotated[str, typer.Option(help="'attention', or 'mse' (the paper's).")] = "attention",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 5e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens, to whole rows.")] = None,
    device_map: DeviceMap = None,
    dtype: DType = "auto",
) -> None:
    """Fine-tune an adapter layer by layer; with packed latents, quantisation-aware.

    An interrupted run goes on from its last checkpoint when started again with the same arguments. An adapter in
    --out stays until the new one is complete, and whatever else is there stays.
    """
    from .train import CSKVTrainer, last_checkpoint, training_arguments, training_rows

    try:
        check_out(out)
        if epochs <= 0:
            raise ValueError(f"`epochs` must be above 0, got {epochs:g}.")
        folder = local_adapter(adapter)
        check_adapter_files(folder)
        name = model or CSKVConfig.from_pretrained(str(folder)).base_model_name_or_path
        if name is None:
            raise ValueError(f"'{adapter}' does not name its base model; give it with --model.")
        tokenizer = AutoTokenizer.from_pretrained(name)
        rows = training_rows(documents(data), tokenizer, length, max_tokens)
        checkpoints = out.with_name(out.name + ".checkpoints")
        settings = {
            "adapter": file_fingerprint(folder / ADAPTER[1]), "model": name, "dtype": dtype,
            "data": file_fingerprint(data), "length": length, "max_tokens": max_tokens,
            "objective": objective, "epochs": epochs, "learning_rate": learning_rate,
            "batch_size": batch_size,
        }  # fmt: skip
        check_same_run(checkpoints, settings)
        base = AutoModelForCausalLM.from_pretrained(name, device_map=device_map, dtype=dtype)
        fitted = load(base, folder)
        arguments = training_arguments(
            checkpoints,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
        )
        trainer = CSKVTrainer(fitted, arguments, rows, objective=objective)
        remember_run(checkpoints, settings)
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
        replace_directory(out, lambda folder: write_adapter(folder, fitted, tokenizer, str(out)))
    except (ValueError, OSError, SafetensorError) as error:
        raise refused(ctx, error) from error
    for checkpoint in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    forget_run(checkpoints)
    tokens = sum(len(row["input_ids"]) for row in rows)
    typer.echo(f"{trainer.state.global_step} steps on {tokens:,} tokens; saved the adapter in {out}")


@app.command()
def inspect(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Directory or Hub id of an adapter.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw what each layer keeps, as a PNG.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    device: Annotated[
        str | None, typer.Option(help="'cpu' or 'cuda': measure it, and predict a decode step per key layout.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache, for --device.")] = 8192,
    query_heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, where the base model's config cannot be read.")
    ] = None,
) -> None:
    """Show what an adapter keeps, layer by layer; with --device, what a decode step is predicted to take."""
    from .cost import predict
    from .plots import plot_allocation

    try:
        folder = local_adapter(adapter, revision=revision)
        check_adapter_files(folder)
        config = CSKVConfig.from_pretrained(str(folder))
        typer.echo(format_report(config))
        if (config.fit_report or {}).get("evaluation"):
            typer.echo(format_evaluation(config.fit_report["evaluation"]))
        if device is not None:
            typer.echo("\n" + predict(config, device, context, query_heads))
        if plot is not None:
            plot_allocation(plot, config)
            typer.echo(f"\nsaved {plot}")
    except (ValueError, ImportError, OSError) as error:
        raise refused(ctx, error) from error


@app.command()
def kernels(
    build: Annotated[
        bool, typer.Option("--build", help="Compile those for the CPU first; about half a minute.")
    ] = False,
) -> None:
    """Say which kernels attention has here; with --build, compile those for the CPU."""
    if build:
        try:
            cpu.build()
        except (RuntimeError, OSError) as error:
            raise typer.BadParameter(str(error)) from error
    on_cpu = f"compiled, {cpu.library_path()}" if cpu.load() else "not compiled; `cskv kernels --build` does it"
    typer.echo(f"CPU: {on_cpu}")
    no_triton = "no Triton; `pip install 'cskv-hf[kernels]'`"
    typer.echo(f"GPU: {'Triton is installed' if HAS_TRITON else no_triton}")


@app.command("eval")
def evaluate_model(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Adapter or model, id or directory; or 'bundled'.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and the answers.")],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="text:FILE, generations:FILE, lines:COUNT, lines:FILE, topics:FILE, needle:FILE, longbench:FILE, "
            "lveval:FILE; may be given several times. 'bundled' has its own."
        ),
    ] = None,
    tables: Annotated[
        str | None,
        typer.Option(
            help="Of the paper, fitted to a model without adapter: methods, initialisation, window, budget, "
            "quantisation; separated by commas. Default: all for 'bundled', methods for another model."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text to fit the tables' adapters on.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Cases of a group, at most.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of a text, at most. Default: --limit, or 64.")] = None,
    length: Annotated[int, typer.Option(min=128, help="Tokens of a row of text, and of the longest haystack.")] = 2048,
    cut: Annotated[
        int | None,
        typer.Option(
            help="Take the middle out of LongBench and LV-Eval prompts of more tokens, as published runs do."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens, to whole samples.")] = 65536,
    epochs: Annotated[float, typer.Option(min=0.0, help="Of training, for the paper's recipe.")] = 2.0,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of training. Default: the paper's 5e-5; 1e-3 for 'bundled'.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the model can take, if its config is wrong about it.")
    ] = None,
    lm_eval: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = None,
    device_map: DeviceMap = None,
    dtype: DType = "auto",
) -> None:
    """Measure an adapter, or the paper's tables on a model; print the numbers, and save them with their intervals.

    An interrupted run continues where it was when started again with the same --out.
    """
    from .evaluate.run import evaluate

    try:
        evaluate(
            model,
            out,
            benchmark or [],
            tables=tables.split(",") if tables else None,
            data=data,
            limit=limit,
            rows=rows,
            length=length,
            cut=cut,
            batch_size=batch_size,
            max_tokens=max_tokens,
            epochs=epochs,
            learning_rate=learning_rate,
            context=context,
            lm_eval_tasks=lm_eval.split(",") if lm_eval else [],
            device_map=device_map,
            dtype=dtype,
            say=typer.echo,
        )
    except (ValueError, ImportError, OSError) as error:
        raise refused(ctx, error) from error


@app.command()
def report(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Directory or Hub id of an adapter.")],
    results: Annotated[
        list[Path] | None, typer.Argument(help="results.json of `cskv eval`, of the adapter or its model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page, or a folder for it.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page, and the JSON behind it, about an adapter and what was measured."""
    from .report import write_report

    try:
        page = write_report(local_adapter(adapter), results or [], out)
    except (ValueError, OSError) as error:
        raise refused(ctx, error) from error
    typer.echo(f"saved {page} and {page.with_suffix('.json')}")


@app.command()
def chat(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Adapter or model, id or directory.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 512,
    full_cache: Annotated[bool, typer.Option("--full-cache", help="Hold the conversation in a full cache.")] = False,
    device_map: DeviceMap = None,
    dtype: DType = "auto",
) -> None:
    """Talk to a model, with the whole conversation in one cache, and see what that holds.

    An empty line or end of input ends it; /cache shows what is held, part by part; /new starts over.
    """
    from .chat import Conversation, converse
    from .evaluate.inputs import load_model

    try:
        loaded, tokenizer = load_model(model, dtype, device_map)
    except (ValueError, OSError) as error:
        raise refused(ctx, error) from error
    compressed = has_active_adapter(loaded) and not full_cache
    make_cache = CSKVCache if compressed else DynamicCache
    typer.echo(f"{'Compressed' if compressed else 'Full'} cache. An empty line ends; /cache, /new.", err=True)
    converse(lambda: Conversation(loaded, tokenizer, make_cache, max_new_tokens=max_new_tokens))


@app.command()
def push(
    ctx: typer.Context,
    adapter: Annotated[
        Path, typer.Argument(help="Directory of an adapter, as `cskv fit` or save_pretrained left it.")
    ],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub; created if it is not there.")],
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base, if the adapter names a directory.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the card; by default the base model's.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload CSKV adapter",
    private: Annotated[bool | None, typer.Option(help="Make a new repository private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; created if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead of pushing.")] = False,
    tag: Annotated[list[str] | None, typer.Option(help="For the card; may be given several times.")] = None,
) -> None:
    """Upload an adapter to the Hub, with a model card of what it keeps and what was measured."""
    try:
        commit = push_folder(
            adapter,
            repo_id,
            base_model=base_model,
            license=license,
            commit_message=message,
            private=private,
            revision=revision,
            create_pr=create_pr,
            tags=tag,
        )
    except (ValueError, OSError) as error:
        raise refused(ctx, error) from error
    typer.echo(f"pushed to {commit.pr_url or commit.commit_url}")
