"""`python -m modeling_clara.cli`: the `clara` command without its script."""

import sys

from . import main

sys.exit(main())
