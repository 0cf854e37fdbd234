"""Phase 1 in plain torch: inferring environments, and judging them."""
