# SPDX-License-Identifier: Apache-2.0
"""A griffe extension: docstrings name code as Hugging Face's do, [`Name`]; the site shows `Name`."""

import re
from typing import Any

import griffe


class Names(griffe.Extension):
    """Turn each [`Name`] of a docstring into `Name` before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"\[(`[^`]+`)\](?:\[[^\]]*\])?(?!\()", r"\1", obj.docstring.value)
