"""The memory of training before it is run: from a model's config, without its weights and without MindSpore."""
from mindpet_lite.estimate.report import Report, as_dict, estimate, table

__all__ = ["Report", "as_dict", "estimate", "table"]
