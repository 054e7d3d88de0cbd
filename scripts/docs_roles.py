"""What `make docs` does to the roles of Sphinx in docstrings, which help() shows: a name stays a name."""

import re


def on_page_content(html: str, **others: object) -> str:
    return re.sub(r":(?:func|class|meth|data):<code>~?([^<]+)</code>", r"<code>\1</code>", html)
