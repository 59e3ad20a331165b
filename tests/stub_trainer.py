"""A trainer without torch: speaks the protocol, does what the job's model name says. For tests of the queue.

`base_model` is a path of words, e.g. `/stub/sleep:2/kill`: `sleep:2` seconds (in steps of 0.05, each reported; where
the job goes on from a checkpoint, only those that are left), `save` (a checkpoint every 10 steps; one is also written
when SIGUSR1 asks), `mute:2` (seconds without a word), `unless:FILE` (fails unless LORAQ_BEATS has that file),
`await:FILE` (waits for it, and is seen to be at work), `say:WORD` (in its log), `only:KIND` (what follows is for a
train or evaluate job), `saving` (a checkpoint without end), `oom:2` (out of memory with micro-batches above 2),
`least:2` (out of memory with less than 2 GiB, and it holds itself to 1 until that has happened), `budget:2` (holds
itself to 2 GiB from now on), `took:2` (measures 2 GiB where 1 was estimated), `fail:REASON`, `exit:CODE`, `kill`
(itself, SIGKILL), `deaf` (ignores SIGTERM), `kill-worker` (SIGKILL to the process above its guardian), `gil:2` (seconds
in native code that lets no other thread run), `child` (starts a child in a session of its own). Every 0.05 s it writes
a line into LORAQ_BEATS, if that is set: process id, time, step. `fault` is an illegal access to the GPU's memory, for
which all clients of an MPS server fail (tests/fake_mps).
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

events = os.fdopen(int(os.environ["LORAQ_EVENTS_FD"]), "w", buffering=1)
asked, started = False, time.time()


def ask(*_: object) -> None:
    global asked
    asked = True


def say(**fields: object) -> None:
    sys.stdout.flush()
    events.write(json.dumps(fields) + "\n")


class Fault(Exception):
    pass


def look_at_mps() -> None:
    """Raises Fault where the server that this is a client of is gone, or another client has brought it down."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "")
    if os.path.exists(f"{folder}/server"):
        with open(f"{folder}/server") as file:
            gone = not os.path.exists(f"/proc/{file.read()}")
        if gone or (os.path.exists(f"{folder}/fault") and os.path.getmtime(f"{folder}/fault") > started):
            raise Fault


def beat(job: str, step: int) -> None:
    look_at_mps()
    if folder := os.environ.get("LORAQ_BEATS"):
        with open(f"{folder}/{job}", "a") as file:
            file.write(f"{os.getpid()} {time.time():.3f} {step}\n")


def checkpoint(request: dict, step: int) -> None:
    folder = f"{request['output']}/trainer/checkpoint-{step}"
    os.makedirs(folder)
    with open(f"{folder}/step.txt", "w") as file:
        file.write(str(step))
    say(type="checkpoint", step=step, folder=folder)


def sleep(request: dict, seconds: float, saves: bool) -> None:
    global asked
    done, steps = 0, max(1, round(seconds / 0.05))
    if request["resume"]:
        with open(f"{request['resume']}/step.txt") as file:
            done = int(file.read())
        print(f"stub: going on from step {done}")
    for step in range(done + 1, steps + 1):
        time.sleep(0.05)
        beat(request["job_id"], step)
        say(type="progress", phase="train", step=step, steps=steps, loss=1 / step)
        if asked or (saves and step % 10 == 0):
            asked = False
            checkpoint(request, step)


def work(request: dict) -> None:
    job, words = request["job_id"], request["spec"]["base_model"].split("/")
    print(f"stub: {job}")
    kind, measured = request["spec"]["kind"], {}
    for word in words:
        verb, _, value = word.partition(":")
        if verb == "only":
            kind = value
        if kind != request["spec"]["kind"]:
            continue
        if verb == "saving":
            os.makedirs(f"{request['output']}/trainer/checkpoint-1")
            with open(f"{request['output']}/trainer/checkpoint-1/half", "w") as file:
                file.write("half")
            open(f"{os.environ['LORAQ_BEATS']}/saving", "w").close()
            time.sleep(600)
        elif verb == "sleep":
            sleep(request, float(value), "save" in words)
        elif verb == "say":
            print(value)
        elif verb == "fail":
            return say(type="failed", reason=value, message="as asked")
        elif verb == "oom":
            micro = request["spec"]["training"]["per_device_train_batch_size"] >> request["rung"]
            if micro > int(value):
                below = {"rung": request["rung"] + 1} if micro > 1 else {}
                return say(type="failed", reason="out_of_memory", message="as asked", **below)
        elif verb == "least":
            held = request["budget_bytes"] / 2**30 if request["ran_out"] else 1
            if held < float(value):
                return say(type="failed", reason="out_of_memory", message="as asked")
        elif verb == "took":
            measured["memory"] = {
                "kind": "gpu",
                "estimated_bytes": int(2**30 * request["correction"]),
                "peak_reserved_bytes": int(float(value) * 2**30),
            }
        elif verb == "budget":
            say(type="progress", phase="data", budget_bytes=int(float(value) * 2**30))
        elif verb == "exit":
            sys.exit(int(value))
        elif verb == "fault":
            folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "")
            if os.path.isdir(folder):
                open(f"{folder}/fault", "w").close()
            raise Fault
        elif verb == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif verb == "kill-worker":
            with open(f"/proc/{os.getppid()}/stat") as file:
                worker = int(file.read().rpartition(")")[2].split()[1])
            os.kill(worker, signal.SIGKILL)
            time.sleep(60)  # for its guardian to end it
        elif verb == "gil":
            ctypes.PyDLL(None).usleep(int(float(value) * 1e6))
        elif verb == "mute":
            time.sleep(float(value))
        elif verb == "await":
            while not os.path.exists(f"{os.environ['LORAQ_BEATS']}/{value}"):
                time.sleep(0.05)
                beat(job, 0)
        elif verb == "unless" and not os.path.exists(f"{os.environ['LORAQ_BEATS']}/{value}"):
            return say(type="failed", reason="bad_data", message="as asked")
        elif verb == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif verb == "child":
            command = [sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"]
            subprocess.Popen(command, start_new_session=True)
    if request["spec"]["kind"] == "ask":
        outcome = {"answers": [{by: {"text": f"{by} says"} for by in request["spec"]["asked"]}], "pid": os.getpid()}
        for by in request["spec"]["asked"]:
            say(type="answer", prompt=0, by=by, text=f"{by} says", done=True, cut=False)
        return say(type="result", outcome=outcome)
    os.makedirs(f"{request['output']}/adapter")
    with open(f"{request['output']}/adapter/adapter_model.txt", "w") as file:
        file.write(job)
    outcome = {"pid": os.getpid(), "adapter": None, "resumed": request["resume"]}
    if request["adapter"]:
        weights = next(name for name in sorted(os.listdir(request["adapter"])) if name.startswith("adapter_model"))
        with open(f"{request['adapter']}/{weights}") as file:
            outcome["adapter"] = file.read()
    if request["members"]:
        outcome["members"] = [Path(folder, "adapter_model.txt").read_text() for folder in request["members"]]
    outcome |= measured
    if training := request["spec"].get("training"):
        micro, rung = training["per_device_train_batch_size"], request["rung"]
        outcome["split"] = [micro >> rung, training["gradient_accumulation_steps"] << rung]
    return say(type="result", outcome=outcome)


signal.signal(signal.SIGUSR1, ask)
say(type="ready")
for line in sys.stdin:
    try:
        work(json.loads(line))
    except Fault:
        message = "AcceleratorError: CUDA error: an illegal memory access was encountered"
        say(type="failed", reason="internal", message=message)
        sys.exit(1)
