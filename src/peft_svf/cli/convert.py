# SPDX-License-Identifier: Apache-2.0
"""`export` and `import`: experts -> checkpoints, LoRAs and GGUF files for other engines, and the way back."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options
from .console import new_path, show_table
from .options import option
from .sources import load_base, load_model, named_sources, read_mixture

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes in vLLM 0.29 to 0.32


def export(
    experts: Annotated[
        list[str], typer.Argument(help="Folder or Hub repository; NAME=EXPERT renames.", metavar="EXPERT...")
    ],
    to: Annotated[Literal["merged", "lora", "gguf"], option("Checkpoint, LoRA, or file for llama.cpp.")],
    out: Annotated[Path, option("New folder; for gguf a new file.")],
    mixture: options.Mixture = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    rank: Annotated[int | None, option("Directions of each weight. Default: all, exact.", panel="LoRA", min=1)] = None,
    energy: Annotated[
        float | None, option("Or the share of the squared change to keep.", panel="LoRA", min=0, max=1)
    ] = None,
    force: Annotated[bool, option("Write a LoRA that leaves out over 5 %.", "--force", panel="LoRA")] = False,
    type: Annotated[Literal["f16", "f32", "q8_0"], option("Type of the weights.", panel="GGUF")] = "f16",
) -> None:
    """
    Write an expert, or a mixture of several, in a form that vLLM, SGLang and llama.cpp serve.

    The base is loaded once, on the CPU.
    """
    from ..experts.export import export_gguf, export_lora, export_merged
    from ..experts.library import loaded

    if rank is not None and energy is not None:
        raise typer.BadParameter("--rank and --energy exclude each other.")
    new_path(out)
    named = {expert.name: expert for expert in loaded(named_sources(experts))}
    if len(named) > 1 and not mixture:
        raise typer.BadParameter("Several experts are exported as a mixture: give each a weight by --mixture.")
    expert = read_mixture(mixture).expert(named) if mixture else next(iter(named.values()))
    base, reader = load_base([expert], model, revision, dtype, device="cpu")
    if to == "lora":
        report = export_lora(expert, base, out, energy if rank is None else rank, force)
        lines = [[kind, str(of["rank"]), f"{of['error']:.2%}"] for kind, of in report.items()]
        show_table(["kind", "rank", "left out"], lines)
        largest = max(of["rank"] for of in report.values())
        allowed = next((limit for limit in VLLM_RANKS if limit >= largest), None)
        hint = f"--max-lora-rank {allowed}" if allowed else f"ranks up to {VLLM_RANKS[-1]} alone: --rank or --energy"
        print(f"vLLM: {hint}")
    elif to == "merged":
        export_merged(expert, base, out, reader)
    else:
        export_gguf(expert, base, out, reader, type)
    print(f"Wrote {out}")


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
    from peft import PeftConfig, PeftModel

    from ..experts.convert import import_reference, nearest_expert
    from ..experts.export import new_place

    new_path(out)
    base, _ = load_model(model, revision, dtype, device="cpu")
    if source.endswith((".pt", ".pth")):
        expert = import_reference(source, base, out.name, description)
    else:
        try:
            PeftConfig.from_pretrained(source)
        except ValueError:
            tuned, _ = load_model(source, None, dtype, device="cpu")
            expert = nearest_expert(tuned, out.name, base, description)
        else:
            adapted = PeftModel.from_pretrained(base, source)
            expert = nearest_expert(adapted, out.name, description=description)
        explained = expert.provenance["explained"]
        show_table(["kind", "explained"], [[kind, f"{share:.1%}"] for kind, share in explained.items()])
    with new_place(out) as scratch:
        expert.save(scratch)
    print(f"Wrote {out}")
