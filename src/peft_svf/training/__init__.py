# SPDX-License-Identifier: Apache-2.0
"""Rows and a reward -> an expert: REINFORCE and evolution strategies (extra `train`)."""

from .evolution import EvolutionConfig, EvolutionTrainer
from .reinforce import ReinforceConfig, ReinforceTrainer

__all__ = ["EvolutionConfig", "EvolutionTrainer", "ReinforceConfig", "ReinforceTrainer"]
