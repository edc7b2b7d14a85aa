"""`python -m torpor` is the same as `torpor`."""

import sys

from torpor.cli.main import main

sys.exit(main())
