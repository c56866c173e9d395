"""The world's adapter files: numpy dictionaries in, numpy dictionaries out, no MindSpore."""
