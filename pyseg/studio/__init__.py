"""A page to look at results and correct them, and the same over HTTP for programs.

`desk.py` holds images, sessions and what is kept on disk, `dispatch.py` who computes when,
`app.py` the web application, ``static/`` the page.
"""

from .desk import Desk

__all__ = ["Desk"]
