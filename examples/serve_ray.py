# SPDX-License-Identifier: Apache-2.0
"""
Serve experts from several replicas: in each the application of `peft-svf serve`, in front of them Ray Serve.

    pip install "peft-svf[serve]" "ray[serve]"
    python examples/serve_ray.py HuggingFaceTB/SmolLM2-135M-Instruct me/math me/code --replicas 2

Without experts the first argument is a bundle. Keys are read from PEFT_SVF_API_KEYS.
"""

import argparse
import os

from ray import serve

from peft_svf import Transformer2Model
from peft_svf.cli.serving.app import build
from peft_svf.cli.serving.engine import Capacity, Engine
from peft_svf.cli.serving.gate import Gate, Rules

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or Hub repository of the base model, or of a bundle")
parser.add_argument("experts", nargs="*")
parser.add_argument("--replicas", type=int, default=2)
parser.add_argument("--gpus", type=float, default=0, help="of a replica")
parser.add_argument("--port", type=int, default=8000)
settings = parser.parse_args()


def application() -> Gate:
    """Build the application: Ray calls this in each replica."""
    two_pass = Transformer2Model.from_pretrained(settings.model, settings.experts)
    two_pass.to("cuda" if settings.gpus else "cpu")
    return build(Engine(two_pass, Capacity()), Rules(tuple(os.environ.get("PEFT_SVF_API_KEYS", "").split())))


serve.start(http_options={"port": settings.port})
replicas = serve.deployment(serve.ingress(application)(), num_replicas=settings.replicas, max_ongoing_requests=96)
serve.run(replicas.options(ray_actor_options={"num_gpus": settings.gpus}).bind(), blocking=True)
