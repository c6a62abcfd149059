# SPDX-License-Identifier: Apache-2.0
"""
`serve`: a base model and experts, or a bundle -> an OpenAI-compatible server.

A request goes through gate (who may ask, and how much) -> app (OpenAI's API) -> engine (tokens).
"""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from ...files import extra
from .. import options
from ..console import check_address, size
from ..dispatch import make_first_pass
from ..options import limit, option
from ..sources import load_experts


def serve(
    model: Annotated[str | None, typer.Argument(help="Base model or bundle: folder or Hub repository.")] = None,
    experts: options.Experts = [],  # noqa: B006
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    mixtures: Annotated[list[str], option("Saved mixture that requests may name.", metavar="NAME=FILE")] = [],  # noqa: B006
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    api_keys: Annotated[Path | None, option("File of keys, one a line. Default: PEFT_SVF_API_KEYS.")] = None,
    admin_keys: Annotated[Path | None, option("Keys that change experts. Default: PEFT_SVF_ADMIN_KEYS.")] = None,
    folder: Annotated[
        Path | None, option("Experts that may be added while the server runs.", exists=True, file_okay=False)
    ] = None,
    strategy: options.Strategy = None,
    classifier: options.Classifier = None,
    probe: options.Probe = None,
    threshold: options.Threshold = 0.0,
    cache_tokens: Annotated[int, limit("Keys and values in memory, in tokens.", min=512)] = 16384,
    batch_tokens: Annotated[int, limit("Tokens in a step of the batch.", min=8)] = 512,
    concurrent: Annotated[int, limit("Requests in the batch.", min=1)] = 32,
    queued: Annotated[int, limit("Requests that may wait for the batch.", min=0)] = 64,
    new_tokens: Annotated[int, limit("Length of an answer.", min=1)] = 1024,
    body_bytes: Annotated[int, limit("Size of a request.", min=1000)] = 4 << 20,
    seconds: Annotated[float, limit("Time for a request with its answer.", min=1)] = 300.0,
) -> None:
    """
    Serve experts over OpenAI's API: each request under its own mixture, all in one batch.

    A request's `model` is base, auto (the first pass chooses), an expert or a mixture. See docs/how_to/serve.md.
    """
    if not experts and model is None:
        raise typer.BadParameter("Name a base model with --experts, or a bundle.")
    with extra("serve", "The server needs more packages"):
        import uvicorn

        from .app import build
        from .engine import Capacity, Engine
        from .gate import Rules
    from transformers.utils.logging import set_verbosity_error

    named = [entry.partition("=")[::2] for entry in mixtures]
    if not all(file for _, file in named):
        raise typer.BadParameter("A mixture is written --mixtures NAME=FILE.")
    check_address(host, port)
    keys, admins = _keys(api_keys, "PEFT_SVF_API_KEYS"), _keys(admin_keys, "PEFT_SVF_ADMIN_KEYS")
    two_pass = load_experts(experts, model, revision, dtype, classifier)
    first_pass = make_first_pass(two_pass, strategy, classifier, probe, threshold)
    two_pass.default_first_pass = first_pass or two_pass.default_first_pass
    for name, file in named:
        two_pass.library.add_mixture(name, file)
    set_verbosity_error()
    try:
        engine = Engine(two_pass, Capacity(cache_tokens, batch_tokens, concurrent, new_tokens))
    except MemoryError as error:
        raise ValueError(f"There is no memory for {cache_tokens} tokens: lower --cache-tokens ({error}).") from error
    try:
        gate = build(engine, Rules(keys, admins, concurrent + queued, body_bytes, seconds), folder)
        names = ", ".join([*two_pass.library.names, *two_pass.library.mixtures])
        cache = f"with a cache of {cache_tokens} tokens ({size(engine.cache_bytes)})"
        print(f"Serving auto, base, {names}\nat http://{host}:{port}/v1, {cache}", flush=True)
        if not keys and host not in ("127.0.0.1", "localhost", "::1"):
            print("Anyone who reaches this address may ask: set keys by --api-keys.", flush=True)
        log = logging.getLogger(__name__)
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
        uvicorn.run(gate, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)
    finally:
        engine.stop()


def _keys(file: Path | None, variable: str) -> tuple[str, ...]:
    """Read keys from a file, else from an environment variable: each is a word."""
    keys = tuple((file.read_text() if file else os.environ.get(variable, "")).split())
    if file and not keys:  # would let everyone in
        raise typer.BadParameter(f"{file} holds no key.")
    return keys
