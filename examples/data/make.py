# SPDX-License-Identifier: Apache-2.0
"""
Make the data beside this file: a part of each benchmark's validation and test split.

    PEFT_SVF_DATA=<folder with the full files> python examples/data/make.py

Rows are the first in the order of `Task.rows(split, seed=0)`, so `rows(split, limit=n)` gives the same from here as
from the full files, as long as n rows are here.
"""

import gzip
import hashlib
import io
import json
from pathlib import Path

from peft_svf.tasks import TASKS
from peft_svf.tasks.task import shuffled

HERE = Path(__file__).parent
# mbpp and svamp are whole: distractors come from the other programs of the split, and svamp is small
COUNTS = {
    "arc_easy": {"validation": 60, "test": 300},
    "arc_challenge": {"validation": 60, "test": 300},
    "svamp": {"validation": 100, "test": 400},
    "gsm8k": {"validation": 80, "test": 300},
    "mbpp": {"validation": 90, "test": 500},
    "dispatch": {"validation": 80, "test": 400},
}
LICENCES = {
    "arc_easy": "CC BY-SA 4.0. AI2 Reasoning Challenge (Clark et al. 2018), the easy set; Hub `allenai/ai2_arc`.",
    "arc_challenge": "CC BY-SA 4.0. AI2 Reasoning Challenge (Clark et al. 2018), the challenge set; Hub "
    "`allenai/ai2_arc`.",
    "svamp": "MIT. SVAMP (Patel et al. 2021), github.com/arkilpatel/SVAMP. Its one set is cut by "
    "`peft_svf.tasks.word_problems`.",
    "gsm8k": "MIT. GSM8K (Cobbe et al. 2021), github.com/openai/grade-school-math. Validation is from the odd rows of "
    "the published train set.",
    "mbpp": "CC BY 4.0. MBPP (Austin et al. 2021), github.com/google-research/google-research. Rows as published, "
    "with an id.",
    "dispatch": "Questions of MBPP (CC BY 4.0), SVAMP and GSM8K (MIT), ARC (CC BY-SA 4.0), and everyday requests made "
    "by `peft_svf.tasks.dispatch` (Apache-2.0); the whole is under CC BY-SA 4.0.",
}


def main() -> None:
    for name, counts in COUNTS.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        lines = [f"# {name}", "", f"Licence and source: {LICENCES[name]}", ""]
        for split, count in counts.items():
            records = shuffled(TASKS[name].load(split), f"{name}:0")[:count]
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
            packed = io.BytesIO()
            with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as file:
                file.write(text)
            (folder / f"{split}.jsonl.gz").write_bytes(packed.getvalue())
            digest = hashlib.sha256(text).hexdigest()
            lines.append(f"- {split}.jsonl.gz: {len(records)} rows, sha256 of the unpacked file {digest}")
        (folder / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
