"""Answers prompts, by the base or with an adapter.

    python generate.py "What is the capital of France?"
    python generate.py --adapter out/finetune/adapter --temperature 0.7 --top-p 0.9 "Who are you?" "你是谁？"
    python generate.py --plain "The capital of France is" --new 8
"""

import sys
from argparse import Namespace
from pathlib import Path

from common import Parser, UserError, explained, run_script  # isort: skip  # first, to say which packages are missing
from bases import load_base
from finetune import use_device
from generation import Generator
from options import Settings

from mindpet_lite import load_adapter


def answer(arguments: Namespace) -> None:
    """Prints an answer for each prompt."""
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1 or arguments.new < 1:
        raise UserError("--temperature must be at least 0, --top-p above 0 and at most 1, --new at least 1")
    use_device(Settings(device=arguments.device))
    base = load_base(arguments.base)
    if arguments.adapter:
        with explained(f"{arguments.adapter} cannot be loaded", ValueError, TypeError, OSError):
            load_adapter(base.net, arguments.adapter)
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    prompts = [base.chat.tokenizer.encode(text).ids if arguments.plain else
               base.chat.prompt([*system, {"role": "user", "content": text}]) for text in arguments.prompts]
    generator = Generator(base.net, min(8, len(prompts)), max(map(len, prompts)) + arguments.new)
    found = generator(prompts, arguments.new, base.chat.stop, arguments.temperature, arguments.top_p, arguments.seed)
    for text, ids in zip(arguments.prompts, found):
        print(f"> {text}\n{base.chat.decode(ids)}\n")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("prompts", nargs="+", help="what to answer")
    parser.add_argument("--base", type=Path, help="a GGUF file or a folder of Hugging Face's (default: SmolLM2)")
    parser.add_argument("--adapter", type=Path, help="an adapter, in any layout that mindpet_lite reads")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--plain", action="store_true", help="continue the text, without the chat template")
    parser.add_argument("--new", type=int, default=128, help="tokens at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the most likely tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--device", default="CPU", choices=("CPU", "Ascend"), help="where to run")
    return run_script("generate.py", lambda: answer(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
