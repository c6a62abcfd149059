# SPDX-License-Identifier: Apache-2.0
"""`python -m peft_svf`, also under `accelerate launch -m`: the command line."""

from .cli import main

raise SystemExit(main())
