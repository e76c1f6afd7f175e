"""The model of --init_from: a model directory, a Hub model or a checkpoint."""

import logging
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from ..checkpoint import assign_weights, load_checkpoint
from ..data.tokenizer import find_tokenizer, load_tokenizer, vocabulary
from ..distributed import sharded_like
from ..errors import InputError
from ..model import Acceleron
from ..pretrained import find_model, read_config

logger = logging.getLogger(__name__)


class InitialModel:
    """The model that a new run starts from. Raises InputError if it is missing or invalid.

    Only `copy_weights` reads or downloads the weights of a Hugging Face model: a resumed run does not need them.

    Attributes:
        config: the model's config.
        directory: the directory of config.json or of the checkpoint. It can have a tokenizer.
    """

    def __init__(self, name: str):
        self._name, self._path, self._contents = name, find_model(name, weights=False), None
        if self._path.is_file():
            self._contents = load_checkpoint(self._path)
            self.directory = self._path.parent
            self.config = replace(self._contents["config"], debug_force_load_balance=False)
        else:
            self.directory = self._path
            self.config = read_config(self.directory).config

    def copy_weights(self, model: Acceleron):
        """Copy the weights to a model with this config. Raises InputError if they are damaged or do not fit."""
        if self._contents:
            assign_weights(model, self._contents, self._path, assign=False)
        else:
            weights, parameters = Acceleron.from_pretrained(self._name).state_dict(), dict(model.named_parameters())
            model.load_state_dict({name: sharded_like(weight, parameters[name]) for name, weight in weights.items()})

    def check_tokenizer(self, tokenizer: Tokenizer, path: Path):
        """Raise InputError if the data's tokenizer has a different vocabulary: the ids would have other meanings.

        Logs a note if the model has no tokenizer.
        """
        own = find_tokenizer(None, self.directory)
        if own is None:
            logger.info(f"note: {self.directory} has no tokenizer.json, so {path} cannot be compared with it")
        elif own != path and vocabulary(load_tokenizer(own)) != vocabulary(tokenizer):
            raise InputError(
                f"{path} and the tokenizer of --init_from, {own}, have different vocabularies: prepare the data with "
                f"`python -m acceleron.data prepare --tokenizer {own}`"
            )
