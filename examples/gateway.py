# SPDX-License-Identifier: Apache-2.0
"""
Choose the expert of each request here, and have it answered by an engine that knows experts as LoRAs, such as vLLM.

    peft-svf export me/math --to lora --out lora/math    # and me/code likewise
    vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --max-lora-rank 64 --port 8001 \
        --lora-modules math=lora/math code=lora/code
    python examples/gateway.py http://localhost:8001/v1 HuggingFaceTB/SmolLM2-135M-Instruct me/math me/code

A request whose `model` is "auto" goes to the expert that the first pass chooses, all others go where they say.
"""

import argparse
import asyncio

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from peft_svf import Transformer2Model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("engine", help="URL of the engine, with /v1")
parser.add_argument("model", help="the base model, as the engine calls it")
parser.add_argument("experts", nargs="+")
parser.add_argument("--port", type=int, default=8000)
settings = parser.parse_args()
two_pass = Transformer2Model.from_pretrained(settings.model, settings.experts)
engine = httpx.AsyncClient(base_url=settings.engine, timeout=600)
app = FastAPI()


@app.post("/v1/chat/completions")
async def chat(request: Request) -> StreamingResponse:
    """Fill in the expert, and pass on the request and its answer, piece by piece if it is a stream."""
    body, key = await request.json(), request.headers.get("authorization", "Bearer none")
    if body.get("model", "auto") == "auto":
        (mixture,) = await asyncio.to_thread(two_pass.first_pass, [body["messages"]])
        body["model"] = mixture.choice if mixture.alpha else settings.model
    passed = engine.build_request("POST", "chat/completions", json=body, headers={"authorization": key})
    answer = await engine.send(passed, stream=True)
    kind = {"content-type": answer.headers["content-type"]}
    return StreamingResponse(answer.aiter_raw(), answer.status_code, kind, background=BackgroundTask(answer.aclose))


uvicorn.run(app, port=settings.port)
