# SPDX-License-Identifier: Apache-2.0
"""The server behind `peft-svf serve`: gate (who may ask, and how much) -> app (OpenAI's API) -> engine (tokens)."""
