"""The pictures of the pages, made anew: `make docs-images [PAGES=…]`.

Pages make their own pictures: a block saves `X.jpg`, the page shows it. Each page that shows one
is run as the tests run it, and what it saved under the name of a shown picture goes to docs/.
Those of the page in the browser come from its tests:
PYSEG_SCREENSHOTS=DIR pytest tests/studio/test_browser.py.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from test_docs import PAGES, Reader, absent, blocks_of, make_world  # noqa: E402

SHOWN = re.compile(r"!\[[^\]]*\]\((?:docs/)?([\w.]+)\)")


def main(pages):
    text = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    shown = {name for page in PAGES for name in SHOWN.findall(text[page])}
    for page in pages or [page for page in PAGES if SHOWN.search(text[page])]:
        if lacking := absent(page):
            raise SystemExit(f"{page} needs {', '.join(lacking)}")
        with tempfile.TemporaryDirectory() as folder:
            make_world(Path(folder))
            os.chdir(folder)
            sys.path.insert(0, folder)
            reader = Reader(page)
            for block in blocks_of(text[page]):
                if not block.skip and not block.slow:
                    reader.run(block)
            for name in sorted(shown & set(os.listdir(folder))):
                shutil.copy(Path(folder, name), ROOT / "docs" / name)
                print(f"docs/{name} from {page}")
            sys.path.remove(folder)
            os.chdir(ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
