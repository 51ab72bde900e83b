"""Private interfaces of torch and tinker that the service uses."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import tinker
import torch

from searchr1_async.local import compat


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a packed layout of x86 processors")
def test_this_version_of_torch_has_onednns_linear() -> None:
    """Fails when a new version drops or changes the operators; the service keeps working, and decodes slower."""
    assert compat.has_onednn(torch.float32), f"torch {torch.__version__} dropped oneDNN's linear and packed layout"


def test_the_service_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(weight: torch.Tensor) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(compat, "packed", gone)
    assert not compat.has_onednn(torch.float32)


def test_this_version_of_tinker_has_its_messages_in_a_file_that_loads_without_torch() -> None:
    """Fails when a new version moves the file; the service then imports tinker whole, and starts seconds later."""
    code = "from searchr1_async.local import protocol; import sys; print(protocol.pb.DTYPE_FLOAT32, *{'torch', 'tinker'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    from tinker.proto import tinker_public_pb2

    assert found.stdout.split() == [str(tinker_public_pb2.DTYPE_FLOAT32)], f"tinker {tinker.__version__}"
