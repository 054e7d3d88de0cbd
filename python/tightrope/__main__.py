"""``python -m tightrope``: the command where the script is not on the path."""

from .cli import main

raise SystemExit(main())
