"""The demo: SmolLM2-135M-Instruct learns to answer as a ship's log, in English and Chinese, and shows it.

    python demo.py
    python demo.py --out /tmp/demo --overwrite

Tunes as configs/ship_log.yaml says, answers all held-out prompts before and after, and counts how many of the answers
are strictly an entry of the log. Writes what finetune.py writes.
"""

import sys

from common import Parser, run_script  # isort: skip  # first, to say which packages are missing
from bases import load_base
from finetune import finetune, use_device
from manner import is_chinese, share
from options import HERE, Settings, add_flags, read
from page import save_results

SHOWN = 6


def demonstrate(settings: Settings) -> None:
    """The whole demo."""
    use_device(settings)
    measured, answers = finetune(settings, load_base(settings.base))
    chinese = [one for one in answers if is_chinese(one.expected)]
    english = [one for one in answers if not is_chinese(one.expected)]
    for one in english[:SHOWN] + chinese[:SHOWN // 2]:
        print(f"\n> {one.prompt}\n  before: {' '.join(one.before.split())}\n  after:  {one.after}")
    counts = {f"manner_{when}{name}": share([getattr(one, when) for one in chosen])
              for name, chosen in (("", answers), ("_english", english), ("_chinese", chinese))
              for when in ("before", "after")}
    save_results(settings, {**measured, **counts}, answers)
    first, last = measured["heldout_loss_before"], measured["heldout_loss_after"]
    print(f"""
answers that are an entry of the log   {counts["manner_before"]} before, {counts["manner_after"]} after
  in English                           {counts["manner_before_english"]} before, {counts["manner_after_english"]} after
  in Chinese                           {counts["manner_before_chinese"]} before, {counts["manner_after_chinese"]} after
held-out loss                          {first:.4f} before, {last:.4f} after ({100 * (last / first - 1):+.1f}%)
trainable                              {measured["trainable"]:,} of {measured["parameters"]:,}
adapter                                {measured["adapter_bytes"]:,} bytes
time                                   {measured["seconds"]:.0f} s

{settings.out / "report.html"}
{settings.out / "adapter"}""")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(__doc__)
    add_flags(parser)
    parser.set_defaults(config=HERE / "configs" / "ship_log.yaml", out=HERE / "out" / "demo")
    arguments = parser.parse_args(argv)
    return run_script("demo.py", lambda: demonstrate(read(arguments)))


if __name__ == "__main__":
    sys.exit(main())
