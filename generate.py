"""Write text with a trained model: python generate.py --checkpoint checkpoint_5000.pt [--prompt "Once"]."""

import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the imports, which take seconds

from acceleron.checkpoint import find_checkpoint, load_checkpoint
from acceleron.device import resolve_device, resolve_dtype
from acceleron.errors import InputError, run_command
from acceleron.flags import Parser, nonempty
from acceleron.generation import Sampling, load_model, open_tokenizer, stream_text


def parse_arguments() -> Namespace:
    parser = Parser(prog="generate.py", description=__doc__)
    parser.add_argument("--checkpoint", type=nonempty, required=True, help="checkpoint_<step>.pt of train.py")
    parser.add_argument("--prompt", help="generate once from this text; without it, prompts are asked for")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="default 256")
    parser.add_argument("--temperature", type=float, default=0.8, help="default 0.8; 0 is greedy")
    parser.add_argument("--top_k", type=int, default=50, help="draw among the k likeliest tokens (default 50; 0: all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest that sum to p (default 1)")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, help="makes the draw repeatable")
    parser.add_argument("--tokenizer", type=nonempty, help="default: beside the checkpoint or pile_tokenizer.json here")
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
    checkpoint = find_checkpoint(arguments.checkpoint, Path("checkpoints"))
    contents = load_checkpoint(checkpoint)
    scripts_dir = Path(__file__).resolve().parent
    tokenizer = open_tokenizer(arguments.tokenizer, checkpoint, contents, scripts_dir)
    model = load_model(contents, checkpoint, device, resolve_dtype(arguments.dtype, device))

    def write(prompt: str):
        escaped = {"errors": "surrogateescape"}
        prompt = prompt.encode(**escaped).decode(**escaped)  # UTF-8, whatever the locale
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
    print("A prompt a line; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            write(input("> "))
        except EOFError:
            print()
            return
        except InputError as error:  # a prompt too long is no reason to end the session
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    sys.exit(run_command(main))
