"""Inside vLLM's API server and engine processes: the executor, the scheduler hook, start-up."""
