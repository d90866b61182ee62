"""`python -m megaboat` is the `megaboat` command."""

import sys

from megaboat.cli import main

sys.exit(main())
