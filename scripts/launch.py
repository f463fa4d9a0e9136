"""Run a recipe: `peft_pretraining.launching.launch` from a checkout, which `scripts/pretrain.sh` starts.

Where it is imported it is the very module, so that what is replaced in one is in both.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from any folder, without installation

from peft_pretraining.launching import launch

if __name__ == "__main__":
    sys.exit(launch.main())
sys.modules[__name__] = launch
