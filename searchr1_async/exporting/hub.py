"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from searchr1_async.errors import ConfigurationError, ExportError

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")


def check_hub_name(name: str) -> None:
    """Raises ConfigurationError for an invalid repository name."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"push_to_hub is {name!r}: name a repository as 'name' or 'organisation/name'")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads a folder, creating the repository if needed, and returns its address. Blocking: call it in a thread.

    Raises:
        ExportError: the hub rejects the upload or is unreachable; the folder is unchanged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    again = f"The export is complete in {folder}: run `hf upload {name} {folder}` when that is fixed."
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Export of trained weights")
    except OfflineModeIsEnabled as error:
        raise ExportError(f"HF_HUB_OFFLINE prevents uploads to the Hugging Face hub: unset it. {again}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = {401: "it requires a token (set HF_TOKEN)", 403: "the token has no write access"}.get(status)
        raise ExportError(f"the Hugging Face hub rejected {name}: {reason or f'HTTP {status}'}. {again}") from error
    except Exception as error:  # httpx errors up to huggingface_hub 1.x, httpx2 errors since
        raise ExportError(f"the upload to the Hugging Face hub failed ({type(error).__name__}). {again}") from error
    return str(repository)
