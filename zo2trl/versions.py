"""This module looks up the versions of installed packages; a bare checkout counts as "not installed"."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["package_version"]


def package_version(package: str) -> str:
    """Return the installed version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
