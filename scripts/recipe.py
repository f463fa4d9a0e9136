"""`peft_pretraining.launching.recipe` from a checkout: the very module, so that what is replaced in one is in both."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from any folder, without installation

from peft_pretraining.launching import recipe

sys.modules[__name__] = recipe
