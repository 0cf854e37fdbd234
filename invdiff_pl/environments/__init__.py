"""Phase 1 in plain torch: scores, partitions and how good they are."""
