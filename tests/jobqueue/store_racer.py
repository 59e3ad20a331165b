"""One of several processes that ask for the same job at the same moment: for each line on standard input, one claim."""

import sys

from helpers import claim

from jobqueue.store import Store

store = Store(sys.argv[1])
store.workers()  # connected
print("ready", flush=True)
for _ in sys.stdin:
    found = claim(store, f"host/{sys.argv[2]}")
    print(found.job_id if found else "-", flush=True)
