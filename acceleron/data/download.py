"""Ready-made shards from the Hugging Face hub."""

from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tqdm import tqdm

from ..errors import InputError


def download(repo: str, num_shards: int, output: str):
    """Fetch the first `num_shards` shard_*.npy of a dataset repository, and its tokenizer.json if there is one.

    Files that are whole already are not fetched again; a broken-off one is resumed. Raises InputError if the
    repository can't be reached or has fewer shards.
    """
    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset")
        shards = sorted(name for name in names if PurePosixPath(name).match("shard_*.npy"))
        if len(shards) < num_shards:
            raise InputError(f"--shards {num_shards}: {repo} has {len(shards)} shards")
        wanted = shards[:num_shards] + [name for name in names if name == "tokenizer.json"]
        for name in tqdm(wanted, desc=repo, unit="file", dynamic_ncols=True):
            path = Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=output))
            path.replace(Path(output) / path.name)  # out of a folder of the repository, if it has folders
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"--repo {repo}: {str(error).strip().splitlines()[0]}") from error
    print(f"{output}: {num_shards} shards of {repo}")
