"""The evaluation: systems that people run today and KevlarFlow, under one load, one fault script, one measure.

A **cell** (`cells`) names a setting, a system, a request rate and a fault script. `drive` runs one: it starts the
system (`contenders`), sends an open-loop load (`workload`), strikes, and yields a `CellResult` (`outcome`), plain
data that is saved as JSON. `suite` runs many, skips what is done, and says how long the rest will take. Tables,
figures and the report (`comparison`, `figures`, `document`) are computed from the saved cells alone.
"""
