"""What a file is that is none of those that are read."""
from __future__ import annotations

import re


def what_it_is(start: bytes) -> str:
    """Return in a sentence what a file of another kind is, by its first bytes, and what to do."""
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start):
        return ("it is a pickle (torch.save's), which can run code when it is read, and is never read; save it as "
                "safetensors where it came from.")
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`."
    return "it was cut short, damaged, or is a file of another kind; copy or save it again."
