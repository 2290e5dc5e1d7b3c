"""Where the real CT and label files for tests and experiments lie; see data/README.md.

`MAKNET_SHARED` names the folder; by default it is `shared/` beside the checkout.
"""

import os
import pathlib

_BESIDE = pathlib.Path(__file__).resolve().parents[2] / "shared"
SHARED = pathlib.Path(os.environ.get("MAKNET_SHARED", _BESIDE))
DATA = SHARED / "data"
PAPER = SHARED / "paper" / "maknet_paper_with_tables.md"
