"""A bundle is a directory with a config.json and a root file system."""

from __future__ import annotations

import os

from . import spec as specs
from .errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .spec import Spec


def load(path: str) -> Spec:
    """The spec of the bundle in `path`, with root.path made absolute.

    Raises:
        SpecError: `bad-bundle` or `bad-spec`.
    """
    if not os.path.isdir(path):
        what = "is not a directory" if os.path.exists(path) else "does not exist"
        raise SpecError(f"bundle {path} {what}", code="bad-bundle", object=path)
    spec = specs.load(os.path.join(path, "config.json"))
    root = os.path.join(path, spec["root"]["path"])
    if not os.path.isdir(root):
        raise SpecError(
            f"root file system {root} of bundle {path} does not exist: put one there or change root.path",
            code="bad-bundle",
            object=root,
        )
    spec["root"]["path"] = os.path.realpath(root)
    return spec
