"""Generate text with a model: python generate.py --checkpoint checkpoint_5000.pt [--prompt "Once"]."""

import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the slow imports

from acceleron.device import resolve_device, resolve_dtype
from acceleron.errors import InputError, run_command
from acceleron.flags import Parser, nonempty
from acceleron.generation import Sampling, open_model, open_tokenizer, stream_text


def parse_arguments() -> Namespace:
    parser = Parser(prog="generate.py", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=nonempty,
        required=True,
        help="checkpoint_<step>.pt, a model directory of acceleron.export, or a Hub model",
    )
    parser.add_argument("--prompt", help="generate once from this prompt (default: interactive)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="maximum tokens to generate (default 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature (default 0.8; 0: greedy)")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the top k tokens (default 50; 0: all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from top tokens that sum to p (default 1)")
    parser.add_argument("--greedy", action="store_true", help="always pick the most likely token")
    parser.add_argument("--seed", type=int, help="random seed for reproducible sampling")
    parser.add_argument("--tokenizer", type=nonempty, help="default: the one next to the model or generate.py")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens {arguments.max_new_tokens}: must be at least 1")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**64:
        raise InputError(f"--seed {arguments.seed}: must be at least 0 and below 2**64")
    temperature = 0.0 if arguments.greedy else arguments.temperature
    sampling = Sampling(temperature, arguments.top_k, arguments.top_p, arguments.seed)
    device = resolve_device(arguments.device)
    model, directory = open_model(arguments.checkpoint, device, resolve_dtype(arguments.dtype, device))
    scripts_dir = Path(__file__).resolve().parent
    tokenizer = open_tokenizer(arguments.tokenizer, directory, model.config.vocab_size, scripts_dir)

    def write(prompt: str):
        escaped = {"errors": "surrogateescape"}
        prompt = prompt.encode(**escaped).decode(**escaped)  # UTF-8 in every locale
        print(prompt, end="", flush=True)
        tokens, start = 0, time.perf_counter()
        try:
            for token, piece in stream_text(model, tokenizer, prompt, arguments.max_new_tokens, sampling):
                print(piece, end="", flush=True)
                tokens += token is not None
        finally:
            print(flush=True)
        seconds = time.perf_counter() - start
        print(f"[{tokens} tokens, {tokens / seconds:.1f} tokens/s]", file=sys.stderr)

    if arguments.prompt is not None:
        write(arguments.prompt)
        return
    print("Enter one prompt per line; Ctrl-D exits.", file=sys.stderr)
    while True:
        try:
            write(input("> "))
        except EOFError:
            print()
            return
        except InputError as error:  # a prompt that is too long must not end the session
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    sys.exit(run_command(main))
