"""Where MindSpore's mixed precision must leave a layer alone, because it has the dtype rule of this package."""
from __future__ import annotations

import mindspore
from mindspore import nn
from mindspore.rewrite.common import namespace

# In PyNative mode MindSpore casts around every operator in a net with `to_float()`, in inner cells too. A cell whose
# `mixed_precision_type` is this one has its operators left as they are.
NO_CASTS = type(nn.Cell().to_float(mindspore.float16).mixed_precision_type).NOTSET


def leave_whole(*kinds: type) -> None:
    """Keep cells of these classes out of the rewriting that level O1 is made of.

    It writes the source of every class of a net anew, without the names that the source needs from its module. A cell
    left whole computes as its own dtype rule says.
    """
    namespace._subtree_black_list.extend(kinds)
