"""Download prepared shards from the Hugging Face Hub."""

from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download
from tqdm import tqdm

from ..errors import InputError, file_error
from ..hub import hub_errors
from .shards import METADATA


def download(repo: str, num_shards: int, output: str):
    """Download a dataset repository's first `num_shards` shard_*.npy, and its tokenizer.json and shards.json.

    Skips complete files and resumes partial ones. Raises InputError if the repository is unreachable, has too few
    shards, or has unsafe or duplicate file names, or if `output` contains a shards.json for different shards.
    """
    with hub_errors(f"--repo {repo}"):
        names = HfApi().list_repo_files(repo, repo_type="dataset")
    shards = sorted(name for name in names if PurePosixPath(name).match("shard_*.npy"))
    for name in shards:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise InputError(
                f"--repo {repo}: its file {name!r} would be written outside {output}; use a repository you trust"
            )
    if len(shards) < num_shards:
        raise InputError(f"--shards {num_shards}: {repo} has only {len(shards)} shards")
    if len({PurePosixPath(name).name for name in shards[:num_shards]}) < num_shards:
        raise InputError(f"--repo {repo}: two folders have shards with the same name; download one manually")
    wanted = shards[:num_shards] + [name for name in names if name in ("tokenizer.json", METADATA)]
    try:
        if (Path(output) / METADATA).exists() and not _has_metadata(repo, names, Path(output) / METADATA):
            raise InputError(f"--output {output} contains a {METADATA} for different shards: choose another directory")
        for name in tqdm(wanted, desc=repo, unit="file", dynamic_ncols=True, disable=None):
            _fetch(repo, name, Path(output))
    except OSError as error:
        raise file_error(f"--output {output}: cannot be written", error) from error
    print(f"{output}: {num_shards} shards of {repo}")


def _has_metadata(repo: str, names: list[str], path: Path) -> bool:
    """Return whether the repository's shards.json equals the one at `path`."""
    if METADATA not in names:
        return False
    with hub_errors(f"--repo {repo}"), TemporaryDirectory() as directory:
        remote = hf_hub_download(repo, METADATA, repo_type="dataset", local_dir=directory)
        return Path(remote).read_bytes() == path.read_bytes()


def _fetch(repo: str, name: str, output: Path):
    """Download one file to the top level of `output`, even if the repository keeps it in a folder."""
    fetched, final = output / name, output / PurePosixPath(name).name
    if final.exists():
        # Move it back to where the Hub client's records in `output` list it as complete.
        fetched.parent.mkdir(parents=True, exist_ok=True)
        final.replace(fetched)
    try:
        with hub_errors(f"--repo {repo}"):
            hf_hub_download(repo, name, repo_type="dataset", local_dir=output)
    finally:
        if fetched.exists():
            fetched.replace(final)
