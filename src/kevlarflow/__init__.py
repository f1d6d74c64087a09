"""KevlarFlow: a fault-tolerance layer under vLLM.

To a user it is ``vllm serve`` with one more property: a node can die in the middle of every
request, and no client notices. ARCHITECTURE.md tells how; start there.
"""

__version__ = "0.1.0"
