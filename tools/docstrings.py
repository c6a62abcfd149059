# SPDX-License-Identifier: Apache-2.0
"""A griffe extension: docstrings are written as Hugging Face's are; the site reads Google's form without markup."""

import re
from typing import Any

import griffe

PARAMETER = r"(?m)^(\s+[\w, *]+ \()(.*?`.*?)(?=\):)"  # name (`int`, *optional*):
ERROR = r"(?m)^(\s+)(`\w+`(?:(?:, | or )`\w+`)*)(?=:)"  # `ValueError`:


class Names(griffe.Extension):
    """Turn each [`Name`] of a docstring into `Name`, and types such as "`int`, *optional*" into "int, optional"."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"\[(`[^`]+`)\](?:\[[^\]]*\])?(?!\()", r"\1", obj.docstring.value)
            obj.docstring.value = re.sub(ERROR, _plain, re.sub(PARAMETER, _plain, text))


def _plain(types: re.Match[str]) -> str:
    """Drop the markup of types; griffe strips closing brackets, so none may stand at the end."""
    plain = re.sub(r"[`*]", "", types[2])
    return types[1] + plain + " " * plain.endswith(")")
