"""What every test shares: asyncio in debug mode, and no reach beyond this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Time is measured in the benchmarks: here it says how busy the machine is.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")
# Set before any library reads them: tests never reach a hub or send telemetry.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TINKER_TELEMETRY="0",
    ANONYMIZED_TELEMETRY="False",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="passive",
)
for name in ("TINKER_API_KEY", "TINKER_BASE_URL", "TINKER_CREDENTIAL_CMD"):
    os.environ.pop(name, None)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True}


LONG = {"faults", "notebooks"}
"""Rooms of tests with whole runs, besides this folder's own files."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: begun last, the longest files would leave one core idle for two minutes."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent != here and item.path.parent.name not in LONG)
