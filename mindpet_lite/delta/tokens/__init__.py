"""Chosen rows of an embedding that train: a method of its own, and beside LoRA as PEFT's `trainable_token_indices`.

Shared by the methods that have it: each says its names in a `RowsOf`.
"""
from mindpet_lite.delta.tokens.rows import RowsOf, are_tokens
from mindpet_lite.delta.tokens.table import TokenTable, rows_shape, table_for, token_table

__all__ = ["RowsOf", "TokenTable", "are_tokens", "rows_shape", "table_for", "token_table"]
