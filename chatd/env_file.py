"""`.env`: what stands there for the environment."""

from __future__ import annotations

import os
from pathlib import Path

from dotenv import load_dotenv

from chatd.errors import ConfigError


class EnvFile:
    """`.env` in a folder. What the environment said before stays, whatever the file says."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".env"
        self._given: dict[str, str] = {}

    def read(self) -> None:
        """Puts the file's values into the environment, in place of those that it had before.

        Without a file there are none. Raises `ConfigError` when it is not UTF-8 text, and changes
        nothing then.
        """
        for name in self._given:
            os.environ.pop(name, None)
        before = dict(os.environ)
        try:
            load_dotenv(self._path, override=False)
        except UnicodeDecodeError:
            os.environ.update(self._given)
            raise ConfigError([f"{self._path}: cannot be read: it is not UTF-8 text"]) from None
        self._given = {n: value for n, value in os.environ.items() if n not in before}
