"""Write docs/options.md, the page of all options, from the program's own tables.

python docs/make_options.py
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from classifier.files import write_atomically
from classifier.options_page import options_page
from image_classification import DEFAULT_RECIPE

if __name__ == "__main__":
    write_atomically(DOCS / "options.md", options_page(DEFAULT_RECIPE).encode())
