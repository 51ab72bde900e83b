"""What the machine allows at most: its memory's bandwidth, and its products at the model's own shapes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.shared.processes import ROOT

ROWS = (1, 6, 32, 64, 512)


def limits(model: str) -> dict[str, float]:
    """The figures, measured in a process of its own, so that its compute threads do not wait in this one."""
    command = [sys.executable, "-m", "benchmarks.local_service.limits", model]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(out.stdout.splitlines()[-1])


def _seconds(function: Callable[[], object], rounds: int = 7) -> float:
    """Of the fastest call after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    import torch

    from searchr1_async.local.model_files import resolve_model
    from searchr1_async.local.torch_models import load_engine

    block, target = torch.ones(2, 64 << 20)
    figures = {
        "memory read and written by a copy, GB/s": 2 * block.nbytes / _seconds(lambda: target.copy_(block)) / 1e9
    }
    figures["memory read by a sum, GB/s"] = block.nbytes / _seconds(block.sum) / 1e9
    model = load_engine(resolve_model(sys.argv[1]), torch.device("cpu"), torch.float32).runner._model  # type: ignore[attr-defined]
    model.pack(None)
    linears = [linear for _, linear in model._linears()]
    numbers = sum(linear.weight.numel() for linear in linears)
    for rows in ROWS:
        inputs = {size: torch.randn(rows, size) for size in {linear.in_features for linear in linears}}
        # Without the output layer where many rows are multiplied: no step does that.
        used = linears if rows <= 64 else linears[:-1]
        count = numbers if rows <= 64 else numbers - linears[-1].weight.numel()
        seconds = _seconds(lambda: [one.forward_packed(inputs[one.in_features]) for one in used])  # noqa: B023
        figures[f"all products of {rows} rows, ms"] = seconds * 1e3
        figures[f"all products of {rows} rows, GFLOPS"] = 2 * count * rows / seconds / 1e9
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
