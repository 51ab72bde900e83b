"""The package's exceptions, as one tree. Every message says what happened, where, and what to do; none holds a key or a token."""

import collections.abc
import contextlib


class SearchR1Error(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigurationError(SearchR1Error, ValueError):
    """Bad input, refused before any work starts."""


class QuestionsError(ConfigurationError):
    """A question suite that cannot be read or holds a question that cannot be used."""


class CorpusError(ConfigurationError):
    """A corpus that cannot be read, is empty, or lacks a column."""


class ModelError(ConfigurationError):
    """An unknown model, a model without a tokenizer, or an unknown tool-call format."""


class RunFolderError(ConfigurationError):
    """A run folder that another process uses, or that holds a run with other settings."""


class ServiceError(SearchR1Error):
    """The Tinker service failed permanently."""


class ServiceUnavailableError(ServiceError):
    """The Tinker service does not answer at its URL."""


class ServiceStartError(ServiceError):
    """The embedded Tinker service did not start."""


class PortInUseError(ServiceError):
    """The port requested for the embedded Tinker service is in use."""


class SearchError(SearchR1Error):
    """The search tool failed after its retries; the episode fails with this as its cause.

    Args:
        is_fatal: no later search can succeed (a refused credential, a missing collection), so the run stops.
    """

    def __init__(self, message: str, *, is_fatal: bool = False) -> None:
        super().__init__(message)
        self.is_fatal = is_fatal


class EmbeddingError(SearchError):
    """The embedder failed after its retries."""


class StoreError(SearchError):
    """The vector store failed after its retries, or does not contain what was expected."""


class SearchUnavailableError(SearchError):
    """A service of the search did not come back within the outage limit; always fatal."""

    def __init__(self, message: str, *, is_fatal: bool = True) -> None:
        super().__init__(message, is_fatal=is_fatal)


class RewardError(SearchR1Error):
    """A reward function raised, or did not return a finite number."""


class CheckpointError(SearchR1Error):
    """A checkpoint that cannot be written or read."""


class ExportError(SearchR1Error):
    """Trained weights that cannot be downloaded, merged or uploaded."""


class TooManyFailuresError(SearchR1Error):
    """More than the allowed fraction of episodes failed, so a service is probably broken."""


def first_error(error: BaseException) -> BaseException:
    """The first real exception in a tree of exception groups."""
    return first_error(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


@contextlib.contextmanager
def ungrouped(kind: type[Exception] = SearchR1Error) -> collections.abc.Iterator[None]:
    """Raises the first error of an exception group instead of the group, if the group holds only errors of this kind.

    The error keeps its cause and traceback, so the traceback ends in the user's line that failed.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        chosen, others = group.split(kind)
        if chosen is None or others is not None:
            raise
        error = first_error(chosen)
        context = error.__context__
        try:
            raise error
        finally:
            error.__context__ = context  # raising it here has made the group its context
