"""Measuring KevlarFlow against what it is compared with, and the load that both are given.

Four ideas, each in modules of its own, so that a new experiment or a new system is an addition:

* a **system under test** (`systems`; how each is started: `recipes`) is ready or is not, has a base URL, and leaves
  nothing behind;
* the **load** (`streams`, `load`, `prompts`) records when each token of each stream arrives, and judges nothing;
* a **measurement** (`measure`) is a pure function of those records;
* an **experiment** (`throughput`, `startup`, `failover`, `detection`, and about replication `resume`,
  `replication_cost`, `standby_memory`, `transfers`) runs systems under load, and yields plain data, which `results` and
  `report` turn into tables, Markdown and JSON.

`demo` and its `scene` are the same parts, put together for a person to watch.
"""
