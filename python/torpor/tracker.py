"""The tracker of a container: a process of the engine that holds what tells which memory the container writes to.

It ends with the container. Its note says since which image it has been there; only the engine reads it.
"""

from __future__ import annotations

NOTE = "tracker.json"
