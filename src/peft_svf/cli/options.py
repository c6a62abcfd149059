# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, as types of their parameters."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def option(help: str, *names: str, panel: str | None = None, **settings: Any) -> Any:
    """Describe an option; its name is the parameter's, its type and default are the signature's."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


first_pass = partial(option, panel="First pass")
search = partial(option, panel="Search")
weight = partial(option, panel="Weights")
limit = partial(option, panel="Limits")

Task = Annotated[str, option("Name of a benchmark, or a JSONL file or folder of your own.")]
Experts = Annotated[
    list[str], option("Folder or Hub repository; repeat for more. NAME=EXPERT renames. Or a bundle.", metavar="EXPERT")
]
Model = Annotated[str | None, option("Base model: folder or Hub repository. Default: the experts' base.")]
Revision = Annotated[str | None, option("Branch, tag or commit of the base model.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    option("Dtype of the base model; auto is the checkpoint's."),
]
Form = Annotated[
    Literal["choice", "generate", "letter", "calculation"] | None,
    option("Pick a given text, write freely, write a letter or a sum. Default: the task's first."),
]
System = Annotated[str | None, option("System prompt before each question.")]
Shots = Annotated[int, option("Solved training examples before each question.", min=0)]
Mixture = Annotated[
    list[str] | None, option("Saved mixture, or an expert's weight; repeat for more.", metavar="FILE|NAME=WEIGHT")
]
BatchSize = Annotated[int, option("Rows per forward.", min=1)]
Host = Annotated[str, option("Address to listen on; 0.0.0.0 for all.")]
Port = Annotated[int, option("Port to listen on.", min=0, max=65535)]
Plot = Annotated[Path | None, option("Also draw the result. Needs peft-svf\\[demo].", metavar="PNG")]

Strategy = Annotated[
    Literal["key", "prompt", "classifier", "probe"] | None,
    first_pass("How it chooses. Default: --classifier or --probe if given, else routing keys, else prompt."),
]
Classifier = Annotated[str | None, first_pass("Expert trained to name the kind of a prompt.", metavar="EXPERT")]
Probe = Annotated[Path | None, first_pass("Folder of a probe: read, or with --fit written.", metavar="FOLDER")]
Fit = Annotated[Path | None, first_pass("Prompts with their `expert` or other, to fit a probe to.", metavar="JSONL")]
Threshold = Annotated[float, first_pass("Below this confidence the base answers.", min=0, max=1)]
