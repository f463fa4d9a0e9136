"""Parts of the scripts that make many runs: study.py and sweep.py."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))  # works from any folder, without installation
