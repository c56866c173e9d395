"""P-tuning: the config is what users need."""
from mindpet_lite.delta.p_tuning.method import PromptEncoderConfig

__all__ = ["PromptEncoderConfig"]
