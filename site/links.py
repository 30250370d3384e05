"""What a page links to outside the documentation: pictures are copied into the site, other files are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures that pages show."""
    for picture in sorted(PICTURES.glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with pictures from the site, and files of the repository by their paths."""
    markdown = re.sub(r"\]\(\.\./benchmarks/results/([\w-]+\.png)\)", r"](pictures/\1)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2` in the repository)", markdown)
