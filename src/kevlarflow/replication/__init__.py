"""Background replication of KV blocks: what to copy, to whom, and where the copies are kept."""
