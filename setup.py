"""The page of an index is not beside the other files: there, what links to them is plain text."""

import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"!?\[([^]]*)\]\((?!https?://|#)[^)]*\)")

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
setup(
    long_description=LINK.sub(r"\1", readme),
    long_description_content_type="text/markdown",
)
