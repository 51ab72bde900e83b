"""Settings by concern: frozen values, checked when created. Defaults are those of the Search-R1 recipe of tinker-cookbook.

``metadata={"flat": name}`` is a field's name where settings are written flat; see :class:`searchr1_async.config.base.Config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from searchr1_async.boundary.paths import absolute_path, as_name_or_folder
from searchr1_async.boundary.settings import (
    Count,
    Natural,
    NotNegative,
    Positive,
    Seconds,
    Share,
    check,
    check_settings,
    plain,
    settings_of,
)
from searchr1_async.errors import ConfigurationError
from searchr1_async.models import Price, Thinking

LossName = Literal["importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"]
WeightsInFlight = Literal["snapshot", "inflight"]
AdvantageName = Literal["centred", "scaled", "leave_one_out"]
NormalizationName = Literal["token", "sequence"]
ScheduleName = Literal["constant", "linear", "cosine"]
FirstTurn = Literal["auto", "shared", "split"]
Method = Literal["search", "direct", "rag", "recipe"]
"""Prompting method.

- ``search``: multi-turn, with the search tool.
- ``direct``: without a tool; one turn, from the model's own knowledge.
- ``rag``: plain retrieval-augmented generation: one search for the question itself, with its passages in the prompt; one turn.
- ``recipe``: with the search tool and the original recipe's prompt (``tinker_cookbook.recipes.search_tool``), verbatim from
  the installed package. Requires the format ``hermes``.
"""
TINKER_PATH = "tinker://"

DEFAULT_RANK = 32
"""Rank of an adapter, as in the recipe."""
MAX_SERVICE_OUTAGE = 3600.0
"""Seconds that work waits for a Tinker service that does not answer."""


def as_model(name: str, value: Any) -> str:
    """A model's name as given, which only a service can judge; a ``Path`` as the absolute path of its folder."""
    if isinstance(value, Path):
        return str(absolute_path(value, name))
    if not (text := check(name, value, str)).strip():
        raise ConfigurationError(f"{name} is {value!r}: pass a name, or leave it out")
    return text


def as_weights(name: str, value: Any) -> str | Path:
    """A ``tinker://`` path unchanged, a run as its folder, a folder as an absolute path."""
    if isinstance(value, str) and value.startswith(TINKER_PATH):
        return value
    return absolute_path(getattr(value, "out_dir", value), name)


def _weights_text(name: str, value: Any) -> str:
    return str(as_weights(name, value))


def _loss_config(name: str, value: Any) -> dict[str, float]:
    values = {key: plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value
    return check(name, {} if value is None else values, Mapping[str, float])


class Checked:
    """A dataclass whose fields are checked by their annotations."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class ModelSettings(Checked):
    """The base model."""

    name: Annotated[str, as_model] | None = field(default=None, metadata={"flat": "model"})
    """As the service names it, or on the embedded service a folder. None: SmolLM2-135M-Instruct on the embedded service, elsewhere
    Qwen3.5-4B or the nearest model of its family that the service offers. With a run's weights: the run's. A named model that the
    service does not offer is refused before any work starts."""
    tokenizer: Annotated[str, as_name_or_folder] | None = None
    """A name or folder. None: the run's, else the model's own."""


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Limits of one episode, with the recipe's defaults; each is documented at :class:`EpisodeSettings`."""

    max_turns: Count = 5
    max_tokens: Count = 1024
    max_trajectory_tokens: Count = 32 * 1024
    max_queries_per_call: Count = 20
    malformed_calls: Literal["end", "tell"] = "end"
    max_seconds: Seconds | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_trajectory_tokens <= self.max_tokens:
            raise ConfigurationError(
                f"max_trajectory_tokens ({self.max_trajectory_tokens}) must be over max_tokens ({self.max_tokens}): "
                "no turn would fit"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSettings(Checked):
    """How an episode is prompted and limited. None leaves a setting open.

    In a training run, open sizes follow the service (:mod:`searchr1_async.config.configs`); the rest is the recipe's. With a run's
    weights, open settings are the run's own.
    """

    format: str | None = None
    """Tool-call format: ``hermes`` (the default) or ``tags``."""
    renderer: str | None = None
    """Chat format, of the ``renderers`` package or ``chatml``. None: the model's own, by its name, or ChatML if its chat template
    is ChatML; other models are refused."""
    thinking: Thinking = None
    """True, False, or an effort such as ``low``, as far as the chat format supports it. None: off if possible, else the lowest
    effort. ``template``: the chat template's default."""
    instructions: str | None = None
    """The system prompt. None: the format's own."""
    max_turns: Count | None = None
    """Sampled turns per episode; a search call in the last turn is not run. Default: 5; on the embedded service 3."""
    max_tokens: Count | None = None
    """Sampled tokens per turn. Default: 1024; on the embedded service 64."""
    max_trajectory_tokens: Count | None = None
    """Tokens of the whole episode; a turn starts only if ``max_tokens`` more would fit. Default: 32768; on the embedded service 4096."""
    max_queries_per_call: Count | None = None
    """Queries per search call; a call with more is malformed. Default: 20."""
    malformed_calls: Literal["end", "tell"] | None = None
    """On a malformed call, ``end`` the episode (the default, as in the recipe) or ``tell`` the model the error and continue (Search-R1)."""
    max_seconds: Seconds | None = field(default=None, metadata={"flat": "episode_time_limit"})
    """Wall-clock seconds per episode, queueing included; None: no limit. An episode cut by it is never trained on, which biases
    training towards short episodes: set it far out in the tail. Counted in ``env/all/stop/time_limit``."""

    def completed_by(self, other: EpisodeSettings) -> Self:
        """These settings, with open ones taken from the other."""
        theirs = asdict(other)
        return replace(self, **{name: theirs.get(name) for name, value in asdict(self).items() if value is None})

    @property
    def format_name(self) -> str:
        """The tool-call format, with the recipe's default."""
        return "hermes" if self.format is None else self.format

    @property
    def limits(self) -> EpisodeLimits:
        """The limits, with the recipe's defaults for open ones; checks them together."""
        return settings_of(EpisodeLimits, {name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True, slots=True)
class SamplingSettings(Checked):
    """How turns are sampled."""

    temperature: NotNegative = 1.0
    """1 samples from the policy itself, as the losses assume; 0 is greedy (evaluation)."""
    seed: int | None = None
    """Each request's seed is derived from this, the question, the group member and the turn; None: the service chooses."""
    deadline: Seconds = field(default=1800.0, metadata={"flat": "sampling_deadline"})
    """Seconds per turn, queueing at the service and retries included; then the episode fails."""
    max_episodes_in_flight: Count = 4096
    """Episodes in flight over all processes, which bounds memory (0.1 MB each). How many sample at once adapts."""
    first_turn: FirstTurn = "auto"
    """Sample a group's first turns with one request (``shared``: less client CPU, but every member waits for the slowest) or one
    per member (``split``). ``auto``: shared in training and rollouts, split in evaluations."""
    workers: Count | Literal["auto"] = "auto"
    """Rollout processes. 1: this one. 2 or more: that many workers (0.2 GB each), and this process only searches, scores and
    trains, so that its event loop stays free. ``auto``: this process below 512 episodes in flight; from there on one worker for
    every full 1,024, at least one, and at most the cores but one. What a worker has sent fails if the service is away for over 5
    minutes, however long ``max_service_outage`` is."""


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """How rollout and training overlap.

    With ``max_staleness`` k, a group that started with the weights after v batches is trained on in batch v + 1 + k at the latest:
    that batch waits for it, and no group starts that could be later. So no finished group is discarded as stale.
    """

    max_staleness: Natural = 0
    """How many batches old the weights a group was sampled from may be. 0 is on-policy: nothing samples while the optimizer
    steps. From 1 on, the next batch's episodes start while the last ones finish and while the trainer works."""
    synchronous: bool = False
    """Train only once the whole batch is rolled out, as in a plain loop; the gradient is the same as with streaming."""
    weights_in_flight: WeightsInFlight = "snapshot"
    """``snapshot``: an episode keeps the weights it started with. ``inflight``: running episodes switch to new weights as they
    are published and keep their key/value cache; importance ratios stay exact. The service does not report which weights sampled
    a token, so versions and staleness are those of the episode's start: an upper bound. The same with ``max_staleness=0``."""
    spare_groups: Natural = 0
    """Extra groups started per batch. Once the batch is full, up to this many of its slowest groups are cancelled and dropped as
    ``too_slow``. Biases training towards questions with short episodes."""
    refill_groups: Natural = 0
    """Extra groups per batch, rolled out to replace groups whose rewards are all equal (dynamic sampling: Yu et al., 2025,
    "DAPO"). Biases training towards questions of medium difficulty, on purpose."""
    min_members: Annotated[int, Field(ge=2)] = 2
    """Finished episodes a group needs to be trained on, at least 2 for an advantage; with fewer it is dropped as
    ``too_few_episodes``. A group cut by ``step_time_limit`` is trained on without its slowest, which biases it to short episodes."""
    step_time_limit: Seconds | None = None
    """Seconds to roll out a batch, counted from when its weights are published. Groups still running then are cut: trained on
    with the members they have, or dropped as ``step_time_limit``. None: no limit."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.synchronous and self.max_staleness:
            raise ConfigurationError("synchronous learning is on-policy: choose max_staleness=0, or synchronous=False")

    @property
    def is_off_policy(self) -> bool:
        """Groups may be sampled from older or changing weights."""
        return self.max_staleness > 0 or self.weights_in_flight == "inflight"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Supervised warm-up before reinforcement learning, on scripted episodes (ideal searches, then the answer) of the real search.

    Only those whose passages contain a golden answer are trained on, so the model does not learn to guess.
    """

    steps: Count = 8
    """Optimizer steps."""
    batch_size: Count = 16
    """Demonstrations per step. 6 to 15 steps of 16 taught a 135M model 95 to 99 % valid calls."""
    learning_rate: Positive = 1e-3
    """Peak, with linear decay to a tenth."""

    def __post_init__(self) -> None:
        check_settings(self, "the warm-up's ")


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """What a batch consists of. None: chosen by the service, or the run's own on a resume (:mod:`searchr1_async.config.configs`)."""

    group_size: Annotated[int, Field(ge=2)] | None = None
    """Episodes per question, at least 2: advantages are centred over them. Default: 8."""
    groups_per_batch: Count | None = None
    """Questions per batch. Default: 512; on the embedded service 8."""
    minibatches: Count | None = None
    """Parts of a batch, equal in tokens, sent to the trainer as their groups finish, and more if it would be idle. Default: 4, or
    ``groups_per_batch`` if less."""
    drop_constant_groups: bool = True
    """Leave out groups whose rewards are all equal: their advantages are 0."""

    def __post_init__(self) -> None:
        check_settings(self)
        parts, groups = self.minibatches, self.groups_per_batch
        if parts is not None and groups is not None and parts > groups:
            raise ConfigurationError(f"minibatches ({parts}) must not exceed groups_per_batch ({groups})")


@dataclass(frozen=True, slots=True)
class LengthSettings(Checked):
    """When a run ends. A resume may change it."""

    steps: Count | None = None
    """Batches to train. None: all batches of ``epochs``, the last partial one included; on the embedded service at most 12 unless
    ``epochs``, ``groups_per_batch`` or ``time_limit`` is given."""
    epochs: Count | None = None
    """Passes over the questions if ``steps`` is None; each is shuffled with the seed and its number. Default: 1."""
    time_limit: Seconds | None = None
    """Seconds of reinforcement learning after which no further step starts. A running evaluation finishes, a waiting one is
    skipped, and the last weights are evaluated. None: no limit."""
    min_steps: Natural = 0
    """Steps that ``time_limit`` does not prevent: on a busy machine the run takes longer instead."""


@dataclass(frozen=True, slots=True)
class HeldOutSettings(Checked):
    """Evaluation on held-out questions during a run. A resume may change it."""

    held_out_samples: Count = 1
    """Episodes per held-out question."""
    evaluate_every: Count | None = None
    """Steps between evaluations beside training, at lower priority. Training waits only if three have not started, and at its
    end. A step's search and sample metrics include them. None: evaluate only before training, after the warm-up and at the end."""


@dataclass(frozen=True, slots=True)
class CheckpointSettings(Checked):
    """Which weights are kept. A resume may change it."""

    checkpoint_every: Count = 20
    """Steps between permanent checkpoints; the resume point is also written after every step."""
    keep_best: bool = False
    """Keep the weights with the highest exact match of all evaluated steps (the earliest on a tie), beside those of
    ``checkpoint_every``; see ``result.best``. They are selected on the held-out questions, which biases their score upwards: report
    them on other questions."""


@dataclass(frozen=True, slots=True)
class ScoringSettings(Checked):
    """Settings of the recipe's reward; unused with a reward of your own."""

    strict_recipe: bool = False
    """Score exactly as the original recipe: its answer rule on the last turn's text, "Answer:" format only."""
    format_coefficient: float = 0.1
    """Penalty of an episode without a readable answer."""


@dataclass(frozen=True, slots=True)
class FaultSettings(Checked):
    """Which faults are tolerated. A resume may change it."""

    max_failed_fraction: Share = 0.2
    """Fraction of failed episodes, per batch or in all, above which the work stops: a service is broken, and the rest would be
    biased."""
    max_service_outage: Seconds = MAX_SERVICE_OUTAGE
    """Seconds to wait for a Tinker service that does not answer. An outage is reported within 15 s and pauses the work and all its
    time limits; past this limit the work ends, a run with its resume point."""


@dataclass(frozen=True, slots=True)
class CostSettings(Checked):
    """What a run may cost. A resume may change it."""

    max_cost: Positive | None = None
    """US dollars, earlier sessions of the run included. No step starts that would exceed it, assuming it costs as much as the most
    expensive so far (the first: as estimated) plus the final evaluation; the run then ends with its resume point. Evaluations before
    the first step, the warm-up, and questions asked of the run are counted but not limited. None: no limit. The embedded service
    costs nothing."""
    price: Price | None = None
    """US dollars per million tokens, if the price table lacks the model or the service is not Tinker's."""


@dataclass(frozen=True, slots=True)
class SelectionSettings(Checked):
    """Which questions of the suites are asked, and how often."""

    split: str | None = None
    """Split of every suite. None: the conventional one."""
    limit: Count | None = None
    """Maximum number of questions per suite."""
    question_seed: int = 0
    """Selects the questions under ``limit``, identically on every machine; larger limits include smaller ones."""
    samples: Count = 1
    """Episodes per question; more narrow the interval and allow pass@k."""


@dataclass(frozen=True, slots=True)
class LearningSettings(Checked):
    """How groups become optimizer steps."""

    optimizer_steps: Count = 1
    """Optimizer steps per batch, each on an equal share of its groups in the order they finished (``num_substeps`` of
    tinker-cookbook); the k-th learns from weights k - 1 steps old."""
    learning_rate: Positive = 4e-5
    """Peak learning rate."""
    schedule: ScheduleName = "constant"
    """Learning rate over all batches: constant (the recipe), or linear or half-cosine decay to 0."""
    schedule_warmup: Natural = 0
    """Batches of linear learning-rate warm-up."""
    lora_rank: Count | None = None
    """Rank of the adapter. None: that of ``start_from``, else 32."""
    start_from: Annotated[str, _weights_text] | None = None
    """Weights to start from, with a new optimizer: another run's folder (its last kept weights, or ``runs/first@best`` or
    ``runs/first@40`` for a step), a ``tinker://RUN/weights/NAME`` path or, on the embedded service, a PEFT adapter's folder. They set
    the rank and, without ``model``, the base model. A resume must pass the same value."""
    beta1: Share = 0.9
    beta2: Share = 0.95
    epsilon: Positive = 1e-8
    gradient_clip: NotNegative = 0.0
    """Maximum global gradient norm; 0 is off (the recipe)."""
    loss: LossName | None = None
    """A loss of the service, or None to choose, which the run reports: ``importance_sampling`` on-policy (the recipe);
    off-policy (``max_staleness`` above 0 or ``inflight`` weights) ``stable_reinforce`` if the service has it, else the clipped
    ``ppo``: unclipped, a few tokens could dominate a step. With ``loss_config``, or when only ``optimizer_steps`` is above 1,
    ``ppo``. A resumed run keeps its loss.

    ``stable_reinforce`` accepts only samples recorded in the same session less than a day ago. Groups that finished before a
    resume are therefore trained on with ``ppo`` in the same optimizer step (``optim/fallback_datums`` counts them)."""
    loss_config: Annotated[Mapping[str, float], _loss_config] = field(default_factory=dict)
    """Passed to the service with the loss (``clip_low_threshold``, …); not to the ``ppo`` fallback of ``stable_reinforce``."""
    advantage: AdvantageName = "centred"
    """``centred``: ``reward - mean`` of the group (the recipe). ``scaled``: divided by the group's standard deviation (GRPO).
    ``leave_one_out``: minus the mean of the other members (RLOO)."""
    normalization: NormalizationName = "token"
    """``token``: every sampled token of a batch has equal weight (the recipe). ``sequence``: every episode has equal weight,
    shared by its tokens."""
    kl_coefficient: NotNegative = 0.0
    """Coefficient of a per-token KL penalty towards the base model, added to the advantages; 0 is off. Costs one request per episode."""
    training_deadline: Seconds = 3600.0
    """Seconds one step's training calls may take, longer while the service reports a capacity pause. Time in which the service
    does not answer counts towards ``max_service_outage`` instead."""


@dataclass(frozen=True, slots=True)
class LocalOptions(Checked):
    """Options of the embedded Tinker service."""

    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """0: any free port."""
    threads: Count | None = None
    """CPU threads of the model; None: all cores."""
    dtype: str = "auto"
    """``float32``, ``bfloat16`` or ``auto``: bfloat16 on a GPU that has it, else float32. On a CPU with AMX or AVX-512 BF16 ``bfloat16``
    trains 1.5 times as fast and takes less memory, but sampler and trainer differ by up to 0.07 nats a token instead of 0.0001."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``mps`` or ``auto``."""
    memory_gb: Positive | None = None
    """Gigabytes (10^9 bytes) that the service plans with; None: a quarter of the machine's memory, or 90 % of the GPU's. With
    less, fewer sequences are sampled at once and micro-batches are smaller; what the model itself needs is always taken, and adapters
    come on top. Models that only transformers can run are not limited."""
    start_timeout: Seconds = 180.0
    """Seconds for loading the model; the first conversion takes about 20 s."""
