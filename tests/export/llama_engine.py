"""llama.cpp from its prebuilt package, as an engine for tests."""

import json
import urllib.request
from pathlib import Path

import torch
import xllamacpp


class Engine:
    """Runs a GGUF file on one thread, with fp32 keys and values. It listens on a free port of 127.0.0.1."""

    def __init__(self, path: Path, max_seq_len: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = max_seq_len
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to f16
        params.n_gpu_layers = params.cache_ram_mib = 0
        params.fit_params = params.warmup = params.ui = False
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def tokenize(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return json.load(response)["tokens"]

    def generate(
        self, prompt_ids: list[int], num_tokens: int, vocab_size: int, banned: list[int]
    ) -> tuple[list[int], str, torch.Tensor]:
        """Greedy decoding without the banned tokens: token ids, text, and log-probabilities of the whole vocabulary.

        Ban tokens that are not valid UTF-8, because the server omits their log-probabilities.
        """
        request = {"prompt": prompt_ids, "n_predict": num_tokens, "temperature": 0, "n_probs": vocab_size}
        request |= {"logit_bias": [[token, False] for token in banned], "cache_prompt": False}
        choice = self.server.handle_completions(request)["choices"][0]
        steps = choice["logprobs"]["content"]
        logprobs = torch.full((len(steps), vocab_size), float("nan"), dtype=torch.float64)
        for row, step in zip(logprobs, steps, strict=True):
            for token in step["top_logprobs"]:
                row[token["id"]] = token["logprob"]
        return [step["id"] for step in steps], choice["text"], logprobs
