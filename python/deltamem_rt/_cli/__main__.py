"""`python -m deltamem_rt._cli` is the `deltamem` command where no script was installed."""

import sys

from . import main

sys.exit(main())
