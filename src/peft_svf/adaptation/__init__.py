# SPDX-License-Identifier: Apache-2.0
"""A prompt, or a few solved examples -> a `Mixture` of experts."""

from .first_pass import FirstPass, dispatch, fit_calibration, fit_probe, fit_temperature
from .judge import RayEvaluator
from .probe import Probe
from .search import Search

__all__ = [
    "FirstPass",
    "Probe",
    "RayEvaluator",
    "Search",
    "dispatch",
    "fit_calibration",
    "fit_probe",
    "fit_temperature",
]
