"""`python -m tptrain`: the console command without an installed script."""

import sys

from tptrain.cli import main

sys.exit(main())
