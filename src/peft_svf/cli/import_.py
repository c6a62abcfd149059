# SPDX-License-Identifier: Apache-2.0
"""`import`: a checkpoint of the original project, a LoRA or a tuned model -> an expert."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .console import new_path, show_table
from .options import option
from .sources import load_model


def import_(
    source: Annotated[str, typer.Argument(help="File (.pt), or folder or repository of a LoRA or a model.")],
    model: Annotated[str, option("Base model: folder or Hub repository.")],
    out: Annotated[Path, option("New folder, whose name is the expert's.")],
    description: Annotated[str, option("What it is good at, for the first pass.")] = "",
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
) -> None:
    """
    Make an expert of what another method has trained.

    learnable_params.pt and policy_params.pt of the original project become equal weights. Of a LoRA or a fully tuned
    model, the expert is the nearest that z-vectors can express; the share of the change that it explains is shown.
    """
    import torch
    from peft import PeftConfig, PeftModel

    from ..experts.convert import import_reference, nearest_expert

    new_path(out)
    cpu = torch.device("cpu")
    base, _ = load_model(model, revision, dtype, device=cpu)
    if source.endswith((".pt", ".pth")):
        expert = import_reference(source, base, out.name, description)
    else:
        try:
            PeftConfig.from_pretrained(source)
        except ValueError:
            tuned, _ = load_model(source, None, dtype, device=cpu)
            expert = nearest_expert(tuned, out.name, base, description)
        else:
            adapted = PeftModel.from_pretrained(base, source)
            expert = nearest_expert(adapted, out.name, description=description)
        explained = expert.provenance["explained"]
        show_table(["kind", "explained"], [[kind, f"{share:.1%}"] for kind, share in explained.items()])
    expert.save(out)
    print(f"Wrote {out}")
