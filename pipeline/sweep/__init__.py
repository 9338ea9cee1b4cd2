"""Many students from cached teachers: grids of runs on Dask, and tables of what came of them.

grid.py        the sweep file; grids -> runs: one configuration, label and folder name each
check.py       everything that can be known to be wrong before the first run starts
directory.py   the sweep's folder: which runs are new, half-way or finished; results.jsonl
cluster.py     Dask: processes started here, or an existing scheduler
worker.py      what a worker process does
table.py       means, spreads and paired differences
run.py         the steps in order, progress and the estimated time
"""
