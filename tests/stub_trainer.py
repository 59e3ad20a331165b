"""A trainer without torch: speaks the protocol, does what the job's model name says. For tests of the queue.

`base_model` is a path of words, e.g. `/stub/sleep:2/kill`: `sleep:2` seconds (in steps of 0.05, each reported), `fail:REASON`,
`exit:CODE`, `kill` (itself, SIGKILL), `deaf` (ignores SIGTERM), `child` (starts a child in a session of its own).
Every 0.05 s it writes a line into the folder LORAQ_BEATS, if that is set: job id, process id, time.
"""

import json
import os
import signal
import subprocess
import sys
import time

events = os.fdopen(int(os.environ["LORAQ_EVENTS_FD"]), "w", buffering=1)


def say(**fields: object) -> None:
    sys.stdout.flush()
    events.write(json.dumps(fields) + "\n")


def beat(job: str) -> None:
    if folder := os.environ.get("LORAQ_BEATS"):
        with open(f"{folder}/{job}", "a") as file:
            file.write(f"{os.getpid()} {time.time():.3f}\n")


def work(request: dict) -> None:
    job = request["job_id"]
    print(f"stub: {job}")
    for word in request["spec"]["base_model"].split("/"):
        verb, _, value = word.partition(":")
        if verb == "sleep":
            steps = max(1, round(float(value) / 0.05))
            for step in range(steps):
                time.sleep(0.05)
                beat(job)
                say(type="progress", phase="train", step=step + 1, steps=steps, loss=1 / (step + 1))
        elif verb == "fail":
            return say(type="failed", reason=value, message="as asked")
        elif verb == "exit":
            sys.exit(int(value))
        elif verb == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif verb == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif verb == "child":
            command = [sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"]
            subprocess.Popen(command, start_new_session=True)
    os.makedirs(f"{request['output']}/adapter")
    with open(f"{request['output']}/adapter/adapter_model.txt", "w") as file:
        file.write(job)
    say(type="result", outcome={"pid": os.getpid(), "adapter": request["adapter"]})


say(type="ready")
for line in sys.stdin:
    work(json.loads(line))
