"""``python -m toolmem`` is the command ``toolmem``."""

from toolmem.cli import entry

entry()
