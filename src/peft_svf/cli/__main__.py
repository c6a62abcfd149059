# SPDX-License-Identifier: Apache-2.0
"""`python -m peft_svf.cli`, also under `torchrun -m`: the command line."""

from . import main

raise SystemExit(main())
