"""This module runs the `zo2trl` command as `python -m zo2trl.cli`."""

import sys

from zo2trl.cli import main

sys.exit(main())
