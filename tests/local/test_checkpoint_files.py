from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from searchr1_async.errors import CheckpointError
from searchr1_async.local import checkpoint_files as checkpoints
from searchr1_async.local.backend import LoraConfig, UserFault
from searchr1_async.local.checkpoint_files import Checkpoint, CheckpointId, CheckpointStore, NoSuchCheckpoint

RUN = "0123abcd:train:0"
STATE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array([7])}


def checkpoint(
    name: str = "one", kind: str = "weights", *, at: float = 100.0, expires: float | None = None
) -> Checkpoint:
    return Checkpoint(
        id=CheckpointId.of(RUN, kind, name),
        base_model="some/model",
        lora=LoraConfig(rank=8, seed=3, train_mlp=False),
        has_optimizer=True,
        created_at=at,
        expires_at=expires,
        size_bytes=0,
        user_metadata={"step": "3"},
    )


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_another_store_reads_a_saved_checkpoint(tmp_path: Path) -> None:
    saved = CheckpointStore(tmp_path).save(checkpoint(), STATE, overwrite=False)
    found, state = CheckpointStore(tmp_path).load(saved.id, now=200.0)
    assert found == saved
    assert found.size_bytes > 24
    assert found.lora == LoraConfig(rank=8, seed=3, train_mlp=False)
    assert state.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(state[name], array)


def test_paths_name_checkpoints(tmp_path: Path) -> None:
    id = CheckpointId.parse(f"tinker://{RUN}/sampler_weights/step-000010")
    assert id == CheckpointId(RUN, "sampler_weights", "step-000010")
    assert CheckpointId.parse(id.path) == id


@pytest.mark.parametrize(
    "path",
    [
        "",
        "one",
        "tinker://run/weights",
        "tinker://run/weights/a/b",
        "tinker://run/other/a",
        "tinker://../weights/a",
        "tinker://run/weights/..",
        "tinker://run/weights/.hidden",
        "tinker://run/weights/a b",
        "tinker://run/weights/" + "a" * 129,
        "tinker:///weights/a",
        "http://run/weights/a",
        "tinker://run/weights/a\n",
    ],
)
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(UserFault):
        CheckpointId.parse(path)


def test_a_checkpoint_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first = store.save(checkpoint(), STATE, overwrite=False)
    with pytest.raises(UserFault, match="overwrite=True"):
        store.save(checkpoint(), {"b": np.zeros(1)}, overwrite=False)
    np.testing.assert_array_equal(store.load(first.id, 200.0)[1]["step"], [7])
    store.save(checkpoint(at=150.0), {"b": np.zeros(1)}, overwrite=True)
    assert list(store.load(first.id, 200.0)[1]) == ["b"]
    assert len(files(tmp_path)) == 2, "the replaced arrays are gone"


def test_expired_checkpoints_are_refused_and_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    kept = store.save(checkpoint("kept"), STATE, overwrite=False)
    brief = store.save(checkpoint("brief", expires=160.0), STATE, overwrite=False)
    swept = store.save(checkpoint("swept", expires=160.0), STATE, overwrite=False)
    assert {item.id for item in store.listing(159.0)} == {kept.id, brief.id, swept.id}
    store.load(brief.id, now=159.0)
    with pytest.raises(NoSuchCheckpoint, match="expired"):
        store.load(brief.id, now=160.0)
    assert [item.id for item in store.listing(160.0)] == [kept.id]
    assert store.sweep(160.0) == 1
    assert all("kept" in name for name in files(tmp_path))
    store.save(checkpoint("swept"), STATE, overwrite=False)


def test_the_expiry_can_be_changed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    id = store.save(checkpoint(), STATE, overwrite=False).id
    store.set_expiry(id, 300.0, now=200.0)
    assert CheckpointStore(tmp_path).find(id, 299.0).expires_at == 300.0
    store.set_expiry(id, None, now=200.0)
    assert store.find(id, 1e12).expires_at is None
    with pytest.raises(NoSuchCheckpoint):
        store.set_expiry(CheckpointId(RUN, "weights", "other"), None, now=0.0)


def test_publishing_outlives_the_process(tmp_path: Path) -> None:
    id = CheckpointStore(tmp_path).save(checkpoint(), STATE, overwrite=False).id
    assert not CheckpointStore(tmp_path).find(id, 200.0).public
    CheckpointStore(tmp_path).set_public(id, True, now=200.0)
    assert CheckpointStore(tmp_path).find(id, 200.0).public


@pytest.mark.parametrize("has_links", [True, False])
def test_a_copy_outlives_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    store = CheckpointStore(tmp_path)
    source = store.save(checkpoint(expires=300.0), STATE, overwrite=False)
    to = CheckpointId("copied:train:0", "weights", "one")
    if not has_links:

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    store.copy(source.id, to, None, 200.0)
    store.delete(source.id, 200.0)
    found, state = store.load(to, now=1e12)
    assert (found.created_at, found.user_metadata, found.has_optimizer) == (200.0, {"step": "3"}, True)
    np.testing.assert_array_equal(state["a.weight"], STATE["a.weight"])
    with pytest.raises(NoSuchCheckpoint):
        store.copy(source.id, CheckpointId("other:train:0", "weights", "one"), None, 200.0)
    assert all(name.startswith("copied") for name in files(tmp_path))


def test_deleting(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    id = store.save(checkpoint(), STATE, overwrite=False).id
    store.delete(id, 200.0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NoSuchCheckpoint):
        store.delete(id, 200.0)


def test_listing_is_by_age_and_run(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for name, at in (("b", 2.0), ("a", 3.0), ("c", 1.0)):
        store.save(checkpoint(name, at=at), STATE, overwrite=False)
    assert [item.id.name for item in store.listing(10.0)] == ["c", "b", "a"]
    assert [item.id.name for item in store.listing(10.0, RUN)] == ["c", "b", "a"]
    assert store.listing(10.0, "another:train:0") == []


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    store = CheckpointStore(tmp_path)
    id = store.save(checkpoint(), STATE, overwrite=False).id
    before = files(tmp_path)

    def fill(state: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(checkpoints, "save_file", fill)
    for name in ("one", "two"):
        with pytest.raises(CheckpointError, match=r"disk is full.*32 bytes in .*more than are free") as full:
            store.save(checkpoint(name), STATE, overwrite=True)
        assert str(tmp_path) in str(full.value)
    assert files(tmp_path) == before
    np.testing.assert_array_equal(store.load(id, 200.0)[1]["step"], [7])


def test_too_little_space_is_detected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="disk is full"):
        store.save(checkpoint(), STATE, overwrite=False)
    assert files(tmp_path) == []


def test_a_full_disk(tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        store = CheckpointStore(mounted)
        with pytest.raises(CheckpointError, match="disk is full"):
            store.save(checkpoint(), {"big": np.zeros(1 << 20, np.float32)}, overwrite=False)
        assert files(mounted) == []
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot create"):
        CheckpointStore(tmp_path / "file" / "below")
    store = CheckpointStore(tmp_path / "store")
    (tmp_path / "store" / RUN.replace(":", ".")).write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        store.save(checkpoint(), STATE, overwrite=False)


def test_startup_removes_files_of_a_killed_process(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    saved = store.save(checkpoint(), STATE, overwrite=False)
    place = tmp_path / RUN.replace(":", ".") / "weights"
    (place / "one" / "state-ffff.safetensors").write_bytes(b"replacing was cut short")
    (place / "one" / "checkpoint.json.partial").write_text("{")
    (place / "two").mkdir()
    (place / "two" / "state-eeee.safetensors").write_bytes(b"the first write was cut short")
    assert [item.id.name for item in store.listing(200.0)] == ["one"]
    written = (place / "two" / "state-eeee.safetensors").stat().st_mtime
    store.clean(written + 60)
    assert len(files(tmp_path)) == 5, "another process may be writing them"
    store.clean(written + 3600)
    assert len(files(tmp_path)) == 2
    store.load(saved.id, 200.0)


def test_a_corrupt_checkpoint_does_not_crash(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    saved = store.save(checkpoint(), STATE, overwrite=False)
    place = tmp_path / RUN.replace(":", ".") / "weights" / "one"
    (place / saved.file).write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load(saved.id, 200.0)
    (place / "checkpoint.json").write_text("{}")
    assert store.listing(200.0) == []
    with pytest.raises(NoSuchCheckpoint):
        store.load(saved.id, 200.0)
