"""Models on the Hugging Face Hub, and one-line errors for its requests."""

import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .errors import InputError

logger = logging.getLogger(__name__)

LOG_IN = "run `hf auth login` or set HF_TOKEN"
CHECK_NETWORK = "check the network and proxy (HF_ENDPOINT, https_proxy)"
# No pickles and no code. Only files at the top level: some repositories keep the same weights again in folders.
PATTERNS = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*"]}


def is_model_id(name: str) -> bool:
    """Return whether `name` has the form user/name. It can still break other rules of the Hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def download_model(repo: str, weights: bool = True) -> Path:
    """Download a model's JSON and, with `weights`, safetensors files into the Hub's cache. Return their directory.

    If the Hub cannot be reached, returns the cached copy and logs its path. Raises InputError.
    """
    patterns = PATTERNS if weights else PATTERNS | {"allow_patterns": ["*.json"]}
    with hub_errors(f"{repo}: no such directory; on the Hub"):
        try:
            # By default the request has no timeout and hangs on a network that drops packets.
            files = HfApi().model_info(repo, timeout=HF_HUB_ETAG_TIMEOUT).siblings or []
        except (HTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise  # the Hub refuses the request
            return _cached_copy(repo, patterns, error)
        if not any(re.fullmatch(r"[^/]+\.safetensors", file.rfilename) for file in files):
            raise InputError(f"{repo} has no safetensors files on the Hub: Acceleron reads no other weights")
        return Path(snapshot_download(repo, **patterns))


def _cached_copy(repo: str, patterns: dict, error: Exception) -> Path:
    try:
        path = Path(snapshot_download(repo, local_files_only=True, **patterns))
    except LocalEntryNotFoundError:
        raise InputError(
            f"{repo}: no such directory, no network ({_one_line(error)}) and no cached copy of the Hub's model: "
            f"check the name; {_network_fix(error)}"
        ) from error
    logger.warning("%s: no network (%s): using the cached copy %s", repo, _one_line(error), path)
    return path


def check_login(repo: str):
    """Raise InputError if the user cannot upload to `repo`. The export command calls this before it starts."""
    what = f"--push_to_hub {repo}"
    if not is_model_id(repo):
        raise InputError(f"{what}: pass user/name, for example someone/my-model")
    with hub_errors(what):
        validate_repo_id(repo)
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise InputError(f"{what}: the token can only read: create one with write access, and {LOG_IN}")


def push(directory: Path, repo: str) -> str:
    """Upload a directory to a model repository in one commit. Creates a missing one. Returns its URL.

    Raises InputError, which says how to upload the directory later.
    """
    api = HfApi()
    try:
        with hub_errors(f"--push_to_hub {repo}"):
            url = api.create_repo(repo, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Upload model from Acceleron")
    except (InputError, OSError) as error:
        command = f"hf upload {repo} {shlex.quote(str(directory))}"
        raise InputError(f"{error}; {directory} is complete: upload it with `{command}`") from error
    return str(url)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Raise InputError, one line that starts with `what`, if a call of huggingface_hub fails. Disk errors pass."""
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise InputError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why the request failed, and the fix."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return f"access is restricted: ask for it on the repository's page, and {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository, or a private one: check the name; for a private one, {LOG_IN}"
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token: {LOG_IN}"
    if status == 401:
        return "the token is not valid: set HF_TOKEN to a valid one, or unset it and run `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled) or (isinstance(error, HTTPError) and status is None):
        return f"the Hub cannot be reached ({_one_line(error)}): {_network_fix(error)}"
    if isinstance(error, (HTTPError, OSError, HFValidationError)):
        return _one_line(error)
    # For example, an HTML login page, or an ftp:// proxy
    return f"invalid response from the Hugging Face Hub ({type(error).__name__}: {_one_line(error)}): {CHECK_NETWORK}"


def _network_fix(error: Exception) -> str:
    return "unset HF_HUB_OFFLINE" if isinstance(error, OfflineModeIsEnabled) else CHECK_NETWORK


def _one_line(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
