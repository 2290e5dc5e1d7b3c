"""`python -m maknet_jax` is the command `maknet`."""

import sys

from maknet_jax.cli import main

sys.exit(main())
