"""The seeded simulator: the real recovery core over a toy model whose KV and tokens can be checked exactly."""
