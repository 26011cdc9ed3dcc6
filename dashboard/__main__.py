"""``python -m haltscale.dashboard``."""

import sys

from haltscale.dashboard.launch import main

sys.exit(main())
