# SPDX-License-Identifier: Apache-2.0
"""
The house of the tests: what holds before anything of torch or Hugging Face is imported.

Nothing is downloaded, nothing is read from or written to the user's caches, and tests that run side by side do not
fight for cores. A variable that is set already wins, so `HF_HUB_OFFLINE=0 pytest -m hub` reaches the Hub. These names
are read when torch and huggingface_hub are imported: set here, before any of them, or not at all.
"""

import atexit
import os
import shutil
import tempfile

# pytest-xdist starts its workers after this ran in the main process, so they inherit these folders.
for _name in ("HF_HOME", "PEFT_SVF_CACHE"):
    if _name not in os.environ:
        os.environ[_name] = tempfile.mkdtemp(prefix=f"{_name.lower()}-")
        atexit.register(shutil.rmtree, os.environ[_name], ignore_errors=True)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402  after the environment, as everything below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run: `gpu` without a CUDA device, `real` without the checkpoint's folder."""
    for item in items:
        if "gpu" in item.keywords:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "real" in item.keywords and not os.path.isdir(os.environ.get("PEFT_SVF_SMOLLM2", "")):
            item.add_marker(pytest.mark.skip(reason="PEFT_SVF_SMOLLM2 does not name the checkpoint's folder"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Experts of the tiny base by name, as PEFT saves them; no test writes to them."""
    import tiny_experts

    return tiny_experts.write_all(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def graphs():
    """The graphs that `torch.compile(model, backend=graphs.backend)` has made."""
    import torch

    class Graphs(list):
        def backend(self, graph, example_inputs):
            self.append(graph)
            return graph.forward

    torch._dynamo.reset()
    return Graphs()
