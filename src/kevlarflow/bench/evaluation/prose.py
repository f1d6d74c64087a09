"""What the report says in words: how emulated time is made, and why a figure differs from the paper's."""

FORMULAS = """\
A stage's forward takes max(bytes / (600 GB/s x 0.8), FLOP / (125 TFLOP/s x 0.5)) + 1 ms, times the slowdown. Bytes are
a quarter of Llama-3.1-8B's layers in bf16 (3.49 GB) and the KV of the step's contexts (32,768 bytes a token and
stage); FLOP are 2 x parameters x tokens, and the attention's. The last stage adds the output head; each stage but the
first adds the time of the step's activations on the link (two tensors, as vLLM sends them), not overlapped. Copies of
KV may take half of a link. Sources: the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009), the A10's
data sheet, the model's published configuration; the efficiencies and the overhead are assumptions.

A process sleeps what is left of that time when its forward is done. Stock vLLM and KevlarFlow get this by the same
hook (`kevlarflow/node/emulated.py`). It also lets stock's workers sleep where they would spin: their activations go
by torch.distributed, as on a GPU, in place of the CPU's shared memory. And workers and engines of both go before a
server that starts beside them (in the cluster, it has its own cores). The network that computes is tiny and random.
Its KV blocks have the real size, are written in full and copied; attention is computed over one head of them, so that
output depends on what was restored. A cell is void when more than 1 % of its steps took over 10 % more than their
emulated time."""

WHY_DIFFERENT = """\
- **MTTR.** The paper's baseline takes about 10 minutes to come back. Here stock's restart is measured, not assumed: no
  weights to fetch, files that the page cache holds, no CUDA start. Our ratio is against a far quicker restart.
- **TTFT.** The paper's ratios of hundreds are queueing over those 10 minutes. Stock's outage is a part of our failure
  window, so that queues are shorter; at a rate that the survivors carry there are none.
- **Latency.** Requests that stock loses have no latency and do not count in its averages: see the column *lost*.
- **Real compute.** All nodes share two cores. When a pipeline is down, the other one has the cores for itself: a loss
  of nodes is no loss of capacity, which flatters stock. The emulated settings do show that loss.
- **Slowdown.** Two cores cannot run the host side of 8 to 16 vLLM workers at an A10's speed, so device and link are
  slowed down alike. Restarts, detection and recovery are not: beside longer requests, an outage is shorter."""
