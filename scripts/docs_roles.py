"""What `make docs` does to docstrings' roles of Sphinx, which editors and help() show: a name stays a name."""

import re


def on_page_content(html: str, **others: object) -> str:
    return re.sub(r":(?:func|class|meth|data):<code>~?([^<]+)</code>", r"<code>\1</code>", html)
