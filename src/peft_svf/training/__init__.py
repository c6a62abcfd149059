# SPDX-License-Identifier: Apache-2.0
"""Rows -> an expert: right answers, REINFORCE on rewards, or evolution strategies (extra `train`)."""

from .evolution import EvolutionConfig, EvolutionTrainer
from .reinforce import ReinforceConfig, ReinforceTrainer
from .supervised import SupervisedConfig, SupervisedTrainer

__all__ = [
    "EvolutionConfig",
    "EvolutionTrainer",
    "ReinforceConfig",
    "ReinforceTrainer",
    "SupervisedConfig",
    "SupervisedTrainer",
]
