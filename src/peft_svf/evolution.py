# SPDX-License-Identifier: Apache-2.0
"""Evolution strategies, by their short path (extra `train`); they are made in `peft_svf.training.evolution`."""

from .training.evolution import EvolutionConfig, EvolutionTrainer

__all__ = ["EvolutionConfig", "EvolutionTrainer"]
