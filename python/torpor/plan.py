"""What a container is made from: a bundle, the host's own files, or what an image says about itself."""

from __future__ import annotations

import os

from . import bundle as bundles
from . import spec as specs
from .errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from .config import Config
    from .spec import Spec


class Plan:
    """A checked spec and where its files come from. `lower` is what the overlay goes over, "" when there is none."""

    __slots__ = ("bundle", "lower", "spec")

    def __init__(self, spec: Spec, *, bundle: str = "", lower: str = "") -> None:
        self.spec = spec
        self.bundle = bundle
        self.lower = lower

    @property
    def on_host_root(self) -> bool:
        return bool(self.lower)

    @property
    def terminal(self) -> bool:
        return bool(self.spec["process"].get("terminal"))


def from_bundle(config: Config, path: str) -> Plan:
    """Raises SpecError: `bad-bundle` or `bad-spec`."""
    path = os.path.abspath(path or ".")
    spec = bundles.load(path)
    specs.set_network(spec, config.network, bundle_less=False)
    return Plan(spec, bundle=path)


def on_host_root(
    config: Config,
    args: Sequence[str],
    *,
    hostname: str,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    terminal: bool = False,
    volumes: Sequence[str] = (),
    lower: str = "/",
) -> Plan:
    """A container on the host's files. Environment and working directory are the caller's own unless given.

    Raises:
        SpecError: `bad-spec`.
    """
    lower = os.path.realpath(lower)
    if not os.path.isdir(lower):
        raise SpecError(f"{lower} is not a directory: it cannot be a container's root", code="bad-bundle", object=lower)
    spec = specs.host_root(
        args,
        env=[f"{name}={value}" for name, value in (os.environ if env is None else env).items()],
        cwd=cwd or _own_directory(lower),
        hostname=hostname[:63],
        terminal=terminal,
        network=config.network,
        volumes=volumes,
        # Other containers' files are below the state directory, and the overlay would show them.
        masked=[config.root],
    )
    specs.check(spec, "the command")
    return Plan(spec, lower=lower)


def is_without_bundle(peeked: Mapping[str, Any]) -> bool:
    """Whether the container in an image was made on the host's files."""
    flags = (peeked.get("container") or {}).get("flags") or {}
    return bool(flags.get("on_host_root"))


def from_image(config: Config, image: str, peeked: Mapping[str, Any], *, hostname: str) -> Plan:
    """The plan for an image of a container without bundle.

    An image is data from outside. Its spec may say what runs, never what that may do: the rest is made here, as for a
    new one.

    Raises:
        SpecError: `bad-bundle`, when it had volumes; `bad-spec`.
    """
    spec = peeked.get("spec") or {}
    specs.check(spec, f"the image in {image}")
    if any(mount.get("type") == "bind" for mount in spec.get("mounts") or []):
        raise SpecError(f"the container in {image} had volumes: restore it with --bundle", code="bad-bundle")
    process = spec["process"]
    return on_host_root(
        config,
        process["args"],
        hostname=spec.get("hostname") or hostname,
        env=dict(entry.split("=", 1) for entry in process.get("env") or []),
        cwd=process["cwd"],
        terminal=bool(process.get("terminal")),
        lower="/",
    )


def _own_directory(lower: str) -> str:
    """Where we are, if the container has that directory too: it has only what is on the file system of its root."""
    here = os.getcwd()
    try:
        same = os.stat(here).st_dev == os.stat(lower).st_dev
    except OSError:
        return "/"
    return here if same and lower == "/" else "/"
