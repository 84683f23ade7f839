"""Writes events.tfevents: what TensorBoard's own writer makes of a few events.

    python3 make_events.py OUT
"""

import sys

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def scalar(tag, value, step, time):
    return Event(wall_time=time, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


events = [
    Event(wall_time=1700000000.25, file_version="brain.Event:2"),
    Event(wall_time=1700000000.25, step=3, session_log=SessionLog(status=SessionLog.START)),
    scalar("train/loss", 2.5, 3, 1700000001.5),
    scalar("train/learning_rate", 1e-4, 300, 1700000002.0),
    scalar("held_out/loss", 0.0, 70000, 1700000003.0),
]
with open(sys.argv[1], "wb") as file:
    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString())
