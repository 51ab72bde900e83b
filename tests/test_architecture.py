"""Architecture rules, checked on the source: imports, public names, and forbidden calls."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

import searchr1_async

ROOT = Path(searchr1_async.__file__).parent
PACKAGE = "searchr1_async"
MODULES = sorted(ROOT.rglob("*.py"))

PUBLIC = """
train rollout evaluate ask estimate_cost export open_run open_report load_questions load_corpus
WarmUp TrainConfig RolloutConfig EvalConfig
Run TrainingResult Report Search Question Passage Episode Group Turn StopReason Score System Judge Answer Demonstration
SearchR1Error
""".split()  # noqa: SIM905

NAMESPACES = ("config", "errors", "evaluation", "events", "rewards", "runs", "search", "testing", "trackers")

HEAVY = """
torch transformers tinker openai renderers polars numpy chromadb faiss matplotlib altair aiohttp httpx huggingface_hub google.genai
rich anyio scipy msgspec
""".split()  # noqa: SIM905
"""Neither the package nor the help of its command imports these."""

FLOORS = """
errors boundary models config episodes billing events data records service search rollout trackers watch runs training
evaluation api testing cli
""".split()  # noqa: SIM905
"""Rooms and loose modules from the ground up: each imports only itself and those before it."""

WAITING = {"Lock", "Event", "Semaphore", "Condition", "Queue", "CapacityLimiter", "Future", "create_task_group"}


def name_of(path: Path) -> str:
    return ".".join([PACKAGE, *path.relative_to(ROOT).with_suffix("").parts])


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """All modules of this package that a file imports."""
    for node in ast.walk(parse(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == PACKAGE)


def is_in(module: str, *rooms: str) -> bool:
    return any(module == f"{PACKAGE}.{room}" or module.startswith(f"{PACKAGE}.{room}.") for room in rooms)


def test_public_names() -> None:
    assert sorted(searchr1_async.__all__) == sorted(PUBLIC)
    assert len(PUBLIC) <= 30
    for name in PUBLIC:
        assert getattr(searchr1_async, name).__doc__, f"{name} has no docstring"
    assert {*PUBLIC, *NAMESPACES} == set(dir(searchr1_async))
    for name in NAMESPACES:
        assert getattr(searchr1_async, name).__doc__, f"{name} has no docstring"
    assert searchr1_async.__version__


@pytest.mark.parametrize("path", [p for p in MODULES if "= lazy_names(" in p.read_text(encoding="utf-8")], ids=name_of)
def test_type_checkers_see_the_names_that_load_on_first_use(path: Path) -> None:
    package = importlib.import_module(name_of(path).removesuffix(".__init__"))
    (block,) = (
        node for node in parse(path).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = [alias for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name or alias.name in package.__all__ for alias in seen), "not exported"
    assert {alias.name for alias in seen} == set(dir(package))
    submodules = {each.stem for each in path.parent.iterdir()} - ({"rollout"} if path.parent == ROOT else set())
    assert not submodules & set(package.__all__), "importing the module would replace the name"
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=r"has no attribute 'no_such_name'"):
        package.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import searchr1_async",
        "from searchr1_async.cli import parser_for; parser_for([]).format_help()",
    ],
)
def test_importing_the_package_loads_nothing_heavy(code: str) -> None:
    code += f"; import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT.parent)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert found.stdout.split() == []


def test_searching_without_training_loads_no_sdk() -> None:
    """A client that only searches starts without the seconds that the SDK and torch take to import."""
    code = (
        "import searchr1_async as sr, sys; sr.Search; sr.load_questions; print(*{'tinker', 'torch'} & {*sys.modules})"
    )
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT.parent)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert found.stdout.split() == []


def test_examples_use_the_public_face() -> None:
    for path in (ROOT.parent / "README.md", *(ROOT.parent / "notebooks").glob("*.ipynb")):
        found = set(
            re.findall(r"(?:import searchr1_async|from searchr1_async)[^\n\"\\]*", path.read_text(encoding="utf-8"))
        )
        assert found <= {"import searchr1_async as sr"}, path


@pytest.mark.parametrize("page", ["README.md", "DESIGN.md", "CONTRIBUTING.md"])
def test_documents_name_files_and_tests_that_exist(page: str) -> None:
    text = (ROOT.parent / page).read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+/[\w.]+\.(?:py|md|html|json))(?:::(\w+))?`", text)
    assert named or page == "README.md"
    for name, test in named:
        found = [path for path in (ROOT.parent / name, ROOT / name) if path.exists()]
        assert found, f"{page} names {name}, which does not exist"
        assert not test or f"def {test}(" in found[0].read_text(encoding="utf-8"), f"{page} names {name}::{test}"


def test_every_error_is_documented() -> None:
    from searchr1_async import errors

    assert all(value.__doc__ for value in vars(errors).values() if isinstance(value, type))


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(name_of(p)) in FLOORS], ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """Imports inside functions and for type checkers count too."""
    allowed = FLOORS[: FLOORS.index(room_of(name_of(path))) + 1]
    assert [name for name in imports(path) if room_of(name) not in (*allowed, "local")] == []


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(name_of(path)) for path in MODULES}
    assert rooms - {"__init__", "__main__", "local"} == set(FLOORS)


@pytest.mark.parametrize("room", ["episodes", "search", "data", "rollout"])
def test_the_engine_does_not_import_services(room: str) -> None:
    for path in MODULES:
        if is_in(name_of(path), room):
            assert [name for name in imports(path) if is_in(name, "service", "local")] == [], path


def test_there_are_no_import_circles() -> None:
    modules = {name_of(path): path for path in MODULES if path.name != "__init__.py"}
    targets = {
        name: {found for each in imports(path) if (found := module_of(each, modules)) not in (None, name)}
        for name, path in modules.items()
    }
    while free := [name for name, wanted in targets.items() if not wanted & targets.keys()]:
        for name in free:
            del targets[name]
    assert sorted(targets) == [], "these import each other, or such modules"


def module_of(imported: str, modules: Container[str]) -> str | None:
    """The module that an import names, as itself or by something in it."""
    return next((name for name in (imported, imported.rpartition(".")[0]) if name in modules), None)


def test_few_modules_stand_at_the_top() -> None:
    loose = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert len(loose) <= 8, loose


def test_a_file_name_means_one_thing() -> None:
    names = [path.name for path in MODULES if path.stem not in ("__init__", "__main__", "compat")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_embedded_service_does_not_import_the_engine() -> None:
    for path in MODULES:
        if is_in(name_of(path), "local"):
            found = [name for name in imports(path) if not is_in(name, "local", "boundary", "errors")]
            assert found == [], f"{path} imports of the engine"


def test_few_modules_start_the_service() -> None:
    users = {name_of(p) for p in MODULES if any(is_in(n, "local") for n in imports(p))}
    assert {name for name in users if not is_in(name, "local")} == {
        f"{PACKAGE}.{name}" for name in ("service.opening", "testing.stand_ins", "testing.__init__")
    }


def test_watch_imports_no_rollout_or_learning() -> None:
    for path in MODULES:
        if is_in(name_of(path), "watch", "trackers"):
            assert [n for n in imports(path) if is_in(n, "rollout", "search", "local")] == [], path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nobody_prints_or_configures_logging(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_command = path.name == "__main__.py"
            assert is_command or called not in ("print", "logging.basicConfig"), f"{path}:{node.lineno}"
            assert called not in ("input", "breakpoint", "asyncio.get_event_loop"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_bound_to_an_event_loop_at_import(path: Path) -> None:
    """Code that runs at import, in modules and class bodies: creates no lock, event, queue or task group."""
    waiting: list[ast.AST] = list(parse(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            bound = called.split(".")[0] in ("anyio", "asyncio") and called.split(".")[-1] in WAITING
            assert not bound, f"{path}:{node.lineno}: {called}"
        waiting.extend(ast.iter_child_nodes(node))


def test_boundary_is_the_lowest_layer() -> None:
    for path in MODULES:
        if is_in(name_of(path), "boundary"):
            assert [name for name in imports(path) if not is_in(name, "boundary", "errors")] == [], path


def test_the_boundary_lists_its_modules() -> None:
    from searchr1_async import boundary

    modules = [path.stem for path in (ROOT / "boundary").glob("*.py") if path.stem != "__init__"]
    assert sorted(re.findall(r"^- :mod:`\.(\w+)`", boundary.__doc__ or "", re.MULTILINE)) == sorted(modules)


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) != f"{PACKAGE}.boundary.tables"], ids=name_of)
def test_tables_have_one_reader(path: Path) -> None:
    """polars expands wildcards in the paths it reads."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            assert not re.fullmatch(r"pl\.(read|scan)_\w+", ast.unparse(node)), f"{path}:{node.lineno}"


OWNERS = {
    r"\.expanduser\(|Path\.home\(": ("boundary.paths",),
    r"\.absolute\(\)": ("boundary.paths", "boundary.tables"),  # of paths that are read already, for polars
    r"\bcsv\.reader|gzip\.open": ("boundary.tables",),
    r"RLIMIT_": ("boundary.paths",),
    r"\bproxy_bypass\b|NO_PROXY": ("boundary.network",),
    r"\bgetproxies\(": ("boundary.network",),
    r"parsedate_to_datetime": ("boundary.network",),
    r"sys\.excepthook|pthread_sigmask": ("boundary.signals",),
    r"tinker\.TinkerError\b": ("boundary.sdk", "boundary.compat"),
    r'get\("TINKER_CREDENTIAL_CMD"': ("service.connection",),
    # What a library does not document.
    r"from tinker\.lib|_sample_backoff_until|shadow_config|_cancel_queue|_client_pools|execute_with_retries": (
        "boundary.compat",
    ),
    r"torch\.ops\.mkldnn|tinker_public_pb2\.py": ("local.compat",),
}


@pytest.mark.parametrize(("text", "owners"), OWNERS.items())
def test_system_and_sdk_calls_have_one_owner(text: str, owners: tuple[str, ...]) -> None:
    users = {name_of(path) for path in MODULES if re.search(text, path.read_text(encoding="utf-8"))}
    assert users == {f"{PACKAGE}.{owner}" for owner in owners}


def test_signals_have_one_owner() -> None:
    """The others are processes that only run a service or a worker, and the command that serves until SIGTERM."""
    allowed = {"boundary.signals", "local.__main__", "rollout.worker_entrypoint", "cli.search_commands"}
    for path in MODULES:
        called = {ast.unparse(node.func) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)}
        handles = any(
            re.search(r"\bsignal\.signal$|add_signal_handler$|open_signal_receiver$", name) for name in called
        )
        assert not handles or name_of(path).removeprefix(f"{PACKAGE}.") in allowed, path
