# SPDX-License-Identifier: Apache-2.0
"""What the tests of adaptation share: a library of two tiny experts with a classifier."""

import pytest
import tiny_experts

from peft_svf import ExpertLibrary


@pytest.fixture(scope="module")
def library(folders):
    return ExpertLibrary(tiny_experts.base(), [folders["math"], folders["code"]], classifier=folders["kinds"])
