"""Text to tokens to shards to windows to batches.

reader -> documents -> spill -> arrange -> shards + index        megaboat data prepare
dataset (mapped shards) -> order (window number -> place) -> loader -> batch
ledger: what was read at each step; evaluation: every token once, in order
"""
