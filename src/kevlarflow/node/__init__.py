"""The node: one process that holds the weights and KV memory of one stage, and serves lanes with it."""
