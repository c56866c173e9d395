"""MindPet's place of R-Drop, an aid of training: see `mindpet_lite.train.r_drop`."""
from mindpet_lite.train.r_drop import RDropLoss, rdrop_repeat

__all__ = ["RDropLoss", "rdrop_repeat"]
