# SPDX-License-Identifier: Apache-2.0
"""A prompt, or a few solved examples -> a `Mixture` of experts."""

from .few_shot import few_shot
from .first_pass import dispatch, fit_calibration, fit_probe, fit_temperature
from .judge import RayEvaluator
from .probe import Probe

__all__ = ["Probe", "RayEvaluator", "dispatch", "few_shot", "fit_calibration", "fit_probe", "fit_temperature"]
