"""`python -m zo2trl` is the `zo2trl` command."""

import sys

from zo2trl.cli import main

sys.exit(main())
