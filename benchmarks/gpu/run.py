"""The embedded service on a CUDA GPU: is it exact, how fast is it, what does it learn in the demo job, and in how much memory?

    python -m benchmarks gpu [--model FOLDER ...]

Through the real tinker SDK, for SmolLM2-135M and every further model (a Hugging Face folder):
- exactness: log-probabilities of sampler and trainer for the same tokens, in float32 and bfloat16, and float32 on the GPU beside
  float32 on the CPU. In float32 every difference must be below 1e-3, or the command fails with status 1;
- sampled tokens a second with 1, 32, 256 and 1,024 requests at once, prefill and training tokens a second, and peak memory;
- the demo job of `make run`: minutes, steps, and exact match before and after reinforcement learning.

A model that does not fit is reported and fails nothing. Without CUDA the command ends with status 2. `--device cpu --quick` tries
the script itself in minutes, and like every run on another device than a GPU only prints.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

import polars as pl

from benchmarks.gpu.device import description, is_cuda, memory_meter, why_no_cuda
from benchmarks.gpu.figures import PRECISIONS, QUICK, WHOLE, Plan, Row, Subject, measure_demo, measure_precision
from benchmarks.gpu.report import SCHEMA, body, problems
from benchmarks.shared.report import write_result
from searchr1_async.local import DEFAULT_MODEL


async def measure(models: list[str], device: str, plan: Plan, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """All rows, and by model the demo job's table of evaluations."""
    meter = memory_meter(device)
    rows: list[Row] = []
    demos: dict[str, str] = {}
    for number, model in enumerate(models):
        subject, own = Subject(model, device, meter), folder / str(number)
        for dtype in PRECISIONS:
            rows += await measure_precision(subject, dtype, plan, own / dtype)
        demo, demos[subject.label] = await measure_demo(subject, plan, own / "demo")
        rows += demo
    return rows, demos


def model_folder(text: str) -> str:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no model: it has no config.json")
    return str(Path(text).resolve())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=model_folder, action="append", default=[], metavar="FOLDER", help="a further model; repeatable"
    )
    parser.add_argument("--device", default="cuda", help="of the model (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes; prints the result and keeps none")
    options = parser.parse_args()
    if is_cuda(options.device) and (reason := why_no_cuda()):
        print(f"This benchmark needs a CUDA GPU. {reason} To try it without: --device cpu --quick", file=sys.stderr)
        return 2
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):  # they would choose another service than the embedded one
        os.environ.pop(name, None)
    plan = QUICK if options.quick else WHOLE
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        rows, demos = asyncio.run(measure([DEFAULT_MODEL, *options.model], options.device, plan, Path(folder)))
    sections = ["\n".join(description(options.device)), *body(rows, demos)]
    if is_cuda(options.device) and not options.quick:
        write_result("gpu", "The embedded service on a GPU", sections, pl.DataFrame(rows, schema=SCHEMA))
    else:
        print("\n\n".join(sections))
    failed = problems(rows)
    for sentence in failed:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if failed else 0
