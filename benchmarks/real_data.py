"""Paths of the real CT and label files that tests and experiments read; see data/README.md.

`MAKNET_SHARED` names the folder; the default is `shared/` next to the checkout.
"""

import os
import pathlib

_DEFAULT = pathlib.Path(__file__).resolve().parents[2] / "shared"
SHARED = pathlib.Path(os.environ.get("MAKNET_SHARED", _DEFAULT))
DATA = SHARED / "data"
PAPER = SHARED / "paper" / "maknet_paper_with_tables.md"
