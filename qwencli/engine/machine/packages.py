"""Installed packages: their versions, and whether one that a feature needs is here, new enough and
loads.

What is new enough the metadata of the installed qwencli says, which is pyproject.toml as it was
built. Run from a folder that was never installed, no version is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from typing import Any

from qwencli.errors import MissingDependencyError

# Extras of those who work on qwencli; they repeat what the others ask for.
_DEVELOPERS = frozenset({"test", "dev"})


def package_version(name: str) -> str | None:
    """Installed version of a distribution, without importing it; None when it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class LeastVersion:
    """The oldest version that qwencli asks for, and the extra that asks; "" = qwencli itself."""

    version: str
    extra: str


@dataclass(frozen=True)
class Outdated:
    """A package that is older than qwencli asks for."""

    name: str
    version: str
    least: LeastVersion

    def __str__(self) -> str:
        return f"{self.name} {self.version} is older than {self.least.version}, which qwencli needs"

    @property
    def fix(self) -> str:
        wanted = f"'qwencli[{self.least.extra}]'" if self.least.extra else self.name
        return f"pip install --upgrade {wanted}"


@cache
def least_versions() -> Mapping[str, LeastVersion]:
    """Distribution, by its normalized name -> what is asked of it on this system; empty where
    qwencli is not installed as a package."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    try:
        found = metadata.metadata("qwencli")
    except metadata.PackageNotFoundError:
        return {}
    extras = ["", *(e for e in found.get_all("Provides-Extra", []) if e not in _DEVELOPERS)]
    asked: dict[str, LeastVersion] = {}
    for extra in extras:
        for line in found.get_all("Requires-Dist", []):
            wanted = Requirement(line)
            least = [each.version for each in wanted.specifier if each.operator == ">="]
            if least and (wanted.marker is None or wanted.marker.evaluate({"extra": extra})):
                name = canonicalize_name(wanted.name)
                asked.setdefault(name, LeastVersion(max(least, key=Version), extra))
    return asked


@cache
def outdated(name: str) -> Outdated | None:
    """The package, if it is installed and older than qwencli asks for.

    Args:
        name: of the distribution, normalized.
    """
    from packaging.version import InvalidVersion, Version

    least, version = least_versions().get(name), package_version(name)
    if least is None or version is None:
        return None
    try:
        is_older = Version(version) < Version(least.version)
    except InvalidVersion:  # of somebody's own build
        return None
    return Outdated(name, version, least) if is_older else None


def outdated_optional() -> tuple[Outdated, ...]:
    """The packages of extras that are installed and older than qwencli asks for."""
    names = (name for name, least in least_versions().items() if least.extra)
    return tuple(old for name in names if (old := outdated(name)))


def package_spec(name: str) -> ModuleSpec | None:
    """The package as it would be imported; None = not installed. Without an `origin` it is a mere
    folder of that name, or what other code of this process has put in its place."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module in `sys.modules` that was made by hand
        return ModuleSpec(name, None)


def require(module: str, needed_by: str, install: str, instead: str = "") -> Any:
    """The module, imported.

    Args:
        module: its name; "ray.data" is a part of the package ray.
        needed_by: the option that needs it, as the user wrote it.
        install: what puts it right. instead: what works without it.

    Raises:
        MissingDependencyError: the package is not installed, is too old, or does not load.
    """
    package = module.partition(".")[0]
    name = package.replace("_", "-")
    or_instead = f", or {instead}" if instead else ""
    spec = package_spec(package)
    if spec is None or spec.origin is None:
        what = "is not installed" if spec is None else "is not installed, only another of its name"
        raise MissingDependencyError(
            f"{needed_by}: the package {name} {what}", install + or_instead
        )
    old = outdated(name)
    if old is not None:
        raise MissingDependencyError(f"{needed_by}: {old}", old.fix + or_instead)
    try:
        return importlib.import_module(module)
    except Exception as error:  # a misfit shows in whatever others' code happens to raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingDependencyError(
            f"{needed_by}: {name} does not load: {reason}",
            f"reinstall it for this Python and torch ({install}){or_instead}",
        ) from error
