"""Ready-made shards from the Hugging Face hub."""

from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError
from tqdm import tqdm

from ..errors import InputError, file_error
from .shards import METADATA


def download(repo: str, num_shards: int, output: str):
    """Fetch the first `num_shards` shard_*.npy of a dataset repository, and its tokenizer.json and shards.json if any.

    Files that are whole already are not fetched again; a broken transfer is taken up where it broke. Raises
    InputError if the repository can't be reached, has fewer shards, or names one so that it would be written elsewhere;
    and if `output` holds the shards.json of other shards.
    """
    try:
        names = _list_files(repo)
        shards = sorted(name for name in names if PurePosixPath(name).match("shard_*.npy"))
        for name in shards:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise InputError(
                    f"--repo {repo}: its file {name!r} would be written outside {output}; trust another one"
                )
        if len(shards) < num_shards:
            raise InputError(f"--shards {num_shards}: {repo} has {len(shards)} shards")
        if len({PurePosixPath(name).name for name in shards[:num_shards]}) < num_shards:
            raise InputError(f"--repo {repo}: several folders have shards of one name; fetch one folder by hand")
        if (Path(output) / METADATA).exists() and not _has_metadata(repo, names, Path(output) / METADATA):
            raise InputError(f"--output {output} holds the {METADATA} of other shards: name another directory")
        wanted = shards[:num_shards] + [name for name in names if name in ("tokenizer.json", METADATA)]
        for name in tqdm(wanted, desc=repo, unit="file", dynamic_ncols=True, disable=None):
            _fetch(repo, name, Path(output))
    except (HFValidationError, HTTPError, OSError) as error:  # HTTPError: the network; OSError: the hub, the disk
        if isinstance(error, OSError) and error.errno:
            raise file_error(f"--output {output}: cannot be written", error) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--repo {repo}: {reason}") from error
    print(f"{output}: {num_shards} shards of {repo}")


def _list_files(repo: str) -> list[str]:
    try:
        return HfApi().list_repo_files(repo, repo_type="dataset")
    except HFValidationError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # HTML of a login page, a proxy of ftp://
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"--repo {repo}: no valid answer from the Hugging Face hub ({reason}): check the network and its proxy"
        ) from error


def _has_metadata(repo: str, names: list[str], path: Path) -> bool:
    """Whether the repository's shards.json is the one at `path`."""
    if METADATA not in names:
        return False
    with TemporaryDirectory() as directory:
        theirs = hf_hub_download(repo, METADATA, repo_type="dataset", local_dir=directory)
        return Path(theirs).read_bytes() == path.read_bytes()


def _fetch(repo: str, name: str, output: Path):
    """Fetch one file into `output` itself, out of the repository's folder if it is in one."""
    fetched, final = output / name, output / PurePosixPath(name).name
    if final.exists():
        # Back to where the hub's records, kept in `output`, know it as whole.
        fetched.parent.mkdir(parents=True, exist_ok=True)
        final.replace(fetched)
    try:
        hf_hub_download(repo, name, repo_type="dataset", local_dir=output)
    finally:
        if fetched.exists():
            fetched.replace(final)
