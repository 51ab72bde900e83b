"""An updatable place in a cell's output, finally replaced by what every viewer of a saved notebook can show."""

from __future__ import annotations

import base64
import uuid
from typing import Any


class Output:
    """Displays ``data`` (by MIME type) in the current cell.

    Needs IPython. The output stays with that cell even when later cells run.
    """

    def __init__(self, data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        from IPython.display import publish_display_data

        self._publish = publish_display_data
        self._id = f"searchr1-{uuid.uuid4().hex}"
        self._publish(data, metadata or {}, transient={"display_id": self._id})

    def update(self, data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        """Replace the displayed data."""
        self._publish(data, metadata or {}, transient={"display_id": self._id}, update=True)

    def settle(self, text: str, png: bytes | None) -> None:
        """Replace the output with its final state: the picture with ``text`` as its alternative, or ``text`` alone.

        No HTML: GitHub would prefer it to the picture and strip its styles.
        """
        if png is None:
            self.update({"text/plain": text})
            return
        # The picture is drawn at 2x for high-density screens.
        width = int.from_bytes(png[16:20], "big") // 2
        self.update(
            {"image/png": base64.b64encode(png).decode(), "text/plain": text},
            {"image/png": {"width": width, "alt": text}} if width else {},
        )
