# SPDX-License-Identifier: Apache-2.0
"""Weight -> basis -> layer -> model: singular-value fine-tuning as a PEFT tuner. Knows nothing of experts or tasks."""
