"""A place in a cell's output that is updated, and settled at the end into what every viewer of a saved notebook shows."""

from __future__ import annotations

import base64
import uuid
from typing import Any


class Output:
    """Displays ``data`` (by MIME type) in the cell that runs.

    Needs IPython; in a kernel the place belongs to that cell also when a later one, or none, runs.
    """

    def __init__(self, data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        from IPython.display import publish_display_data

        self._publish = publish_display_data
        self._id = f"searchr1-{uuid.uuid4().hex}"
        self._publish(data, metadata or {}, transient={"display_id": self._id})

    def update(self, data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        """Shows ``data`` instead."""
        self._publish(data, metadata or {}, transient={"display_id": self._id}, update=True)

    def settle(self, text: str, png: bytes | None) -> None:
        """What stays in the notebook: the picture, with ``text`` for those who do not see it; ``text`` alone without one.

        No HTML is among it: GitHub would prefer it to the picture, and strip its styles.
        """
        if png is None:
            self.update({"text/plain": text})
            return
        # The picture is at twice its size, for dense screens.
        width = int.from_bytes(png[16:20], "big") // 2
        self.update(
            {"image/png": base64.b64encode(png).decode(), "text/plain": text},
            {"image/png": {"width": width, "alt": text}} if width else {},
        )
