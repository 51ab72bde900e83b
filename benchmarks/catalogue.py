"""The benchmarks: what each one asks and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One folder with a `run.py`.

    Args:
        name: of the folder.
        question: that it answers.
        minutes: of the whole benchmark on 2 cores; `~` marks an estimate.
    """

    name: str
    question: str
    minutes: str

    @property
    def module(self) -> str:
        """Whose `main` runs it, with the arguments in `sys.argv`."""
        return f"benchmarks.{self.name}.run"


BENCHMARKS = (
    Benchmark("throughput", "How near does training come to the service's own speed, beside tinker-cookbook?", "~40"),
    Benchmark(
        "engine_cost", "What does an episode cost the client in CPU and memory, and who makes its loop late?", "~35"
    ),
    Benchmark("off_policy", "Does learning from weights up to 8 batches old still learn?", "75"),
    Benchmark("workers", "How much do worker processes speed up rollouts where the client is the limit?", "~3"),
    Benchmark("first_turn", "One request for all first turns of a group, or one each?", "~20"),
    Benchmark("evaluate_beside", "What does measuring held-out questions beside training cost?", "~15"),
    Benchmark("kills", "Does a run that is killed at random moments train on every question exactly once?", "23"),
    Benchmark("soak", "Do memory and bookkeeping hold for half an hour under faults?", "30"),
    Benchmark("live_view", "How much of the client's CPU does the live view take?", "~4"),
    Benchmark("evaluation_throughput", "How near does evaluation come to the service's own speed?", "12"),
    Benchmark("evaluation", "What do warm-up and RL buy a small model on five Wikipedia suites?", "~40"),
    Benchmark(
        "intervals", "Do the confidence intervals cover the truth, and do the tests keep their error rate?", "13"
    ),
    Benchmark("scoring", "Do exact match and F1 agree with an independent implementation?", "1"),
    Benchmark(
        "search", "How many requests and how much time does search at scale take, beside the recipe's way?", "~10"
    ),
    Benchmark("serving", "What does serving a search over HTTP cost?", "~1"),
    Benchmark("compact_index", "How do memory, speed and recall of the compact index grow to 21 million rows?", "~120"),
    Benchmark("compact_real", "How many answers does the compact index lose on real passages and questions?", "~20"),
    Benchmark("compact_geometry", "Are made vectors as hard to search as real ones?", "~10"),
    Benchmark("compact_vectors", "Which weights join two small models into good vectors of 768 numbers?", "~120"),
    Benchmark("local_service", "How fast does the embedded service sample, and do sampler and trainer agree?", "~4"),
    Benchmark(
        "gpu", "Is the embedded service exact on a CUDA GPU, how fast is it there, and what does it learn?", "~20"
    ),
    Benchmark(
        "lean_transformer",
        "Is the embedded service's own transformer worth its lines, beside transformers + peft and llama.cpp?",
        "10",
    ),
    Benchmark("export", "Do exported weights give the service's log-probabilities?", "~5"),
    Benchmark("atlas_seeds", "Does RL beat the warm-up in `make run`, over several seeds?", "22"),
    Benchmark("suites", "Does an hour of RL help on questions of HotpotQA, 2Wiki and PopQA?", "78"),
)
