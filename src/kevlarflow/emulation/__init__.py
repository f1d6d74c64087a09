"""Device time and links of a cluster that is not there, published figures in place of a measured device.

`profile` says how long a stage's forward takes on the emulated device, and is pure. What makes a worker take that long
is `kevlarflow.node.emulated`, one hook for stock vLLM and for KevlarFlow's nodes.
"""
