# SPDX-License-Identifier: Apache-2.0
"""Print a pip constraint for each lower bound of the package and of training: `tools/lowest.py > lowest.txt`."""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
core = text.partition("dependencies = [")[2].partition("quant = ")[0]
print("\n".join(f"{name}=={version}.*" for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', core)))
