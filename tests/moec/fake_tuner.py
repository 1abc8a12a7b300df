"""A worker of ``moec tune`` without a GPU: its clock shows what the analytic model says, with noise.

The command line gives a JSON file: ``problems`` by the shape of their weights, ``constants`` of the model,
``noise``, ``specialised``: how many times as long warps with tasks of their own take, and ``behave``: what a
schedule does in place of running (crash, hang, wrong, fatal, garbage). Each request is written to ``log``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from moec.codegen.constants import Constants
from moec.codegen.ladders import parse_ladder
from moec.codegen.schedules import Problem
from moec.codegen.select import terms
from moec.ir.devices import GPUS

TARGET = "sm_90a"


def main(plan: dict[str, Any]) -> None:
    drawn: dict[str, Any] = {}
    reference = ""
    for line in sys.stdin:
        request = json.loads(line)
        with Path(plan["log"]).open("a", encoding="utf-8") as log:
            log.write(json.dumps({k: v for k, v in request.items() if k != "arguments"}) + "\n")
        reply: dict[str, Any]
        if request["do"] == "about":
            reply = plan.get("about") or {"device": plan["device"], "capability": [9, 0]}
        elif request["do"] == "operands":
            drawn, reference = request, ""
            reply = {"sets": 2} if plan.get("memory", True) else {"error": "out of memory", "kind": "memory"}
        else:
            name = json.loads((Path(request["package"]) / "manifest.json").read_text())["name"]
            schedule = name.partition(" ")[2]
            reference = schedule if request["reference"] else reference
            reply = measured(plan, drawn, schedule, reference)
        print(json.dumps(reply), flush=True)
        if reply.get("fatal"):
            return


def measured(plan: dict[str, Any], drawn: dict[str, Any], schedule: str, reference: str) -> dict[str, Any]:
    assert reference, "results without any to compare them with"
    how = plan["behave"].get(schedule)
    if how == "crash":
        print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
        os.abort()
    if how == "hang":
        time.sleep(1000)
    if how == "garbage":
        print("not JSON", flush=True)
    if how == "fatal":
        return {"error": "LaunchFailed: an illegal memory access", "kind": "failed", "fatal": True}
    if (how == "wrong" or plan["behave"].get(reference) == "alone") and schedule != reference:
        return {"error": "its results are off by 1.0e+00 of the largest", "kind": "wrong"}
    weights = next(a["shape"] for a in drawn["arguments"] if a["role"] == "weights")
    problem = Problem(**plan["problems"][json.dumps(weights)])
    ((_, s),) = parse_ladder(schedule, problem, GPUS[TARGET])
    rows = drawn["choices"]["tokens"] * drawn["choices"]["choices"] / problem.experts
    seconds = sum(terms(s, problem, GPUS[TARGET], rows, Constants(**plan["constants"])).values())
    seconds *= plan["specialised"] if s.form == "specialised" else 1.0
    return {"seconds": seconds * random.Random(schedule).lognormvariate(0, plan["noise"])}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
