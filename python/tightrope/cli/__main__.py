"""``python -m tightrope.cli``: the command where the script is not on the path."""

from . import main

raise SystemExit(main())
