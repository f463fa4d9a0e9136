"""Parts of check_gpu.py, which tries on a machine what training needs."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))  # works from any folder, without installation
