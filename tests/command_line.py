# SPDX-License-Identifier: Apache-2.0
"""What the tests of the command line share: rows, a settings file, and a run with what it prints."""

import json
import random

from peft_svf.cli import main

YAML = """\
model_name_or_path: {base}
task: {rows}
description: the larger of two numbers
output_dir: {out}
max_steps: 4
per_device_train_batch_size: 16
learning_rate: 2e-2
eval_strategy: steps
eval_steps: 2
disable_tqdm: true
"""


def write_rows(path, count=80):
    draw = random.Random(0)
    pairs = [draw.sample(range(10, 100), 2) for _ in range(count)]
    rows = [{"prompt": f"{a} or {b}?", "choices": [str(a), str(b)], "label": int(b > a)} for a, b in pairs]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(capsys, *argv):
    """Run a command: exit code, standard output, standard error."""
    capsys.readouterr()
    code = main([str(part) for part in argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err
