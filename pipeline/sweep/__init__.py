"""Many students from cached teachers: grids of runs on Dask, and tables of what came of them.

file.py        the sweep file
grid.py        grids -> runs: one configuration, label and folder name each
check.py       everything that can be known to be wrong before the first run starts
directory.py   the sweep's folder: which runs are new, half-way or finished
together.py    runs that share one stream of batches
cluster.py     Dask: processes of one's own, or an existing scheduler
worker.py      what a worker process does
results.py     results.jsonl
table.py       means, spreads and paired differences
estimate.py    how long it will take
run.py         the story that ties them together
"""
