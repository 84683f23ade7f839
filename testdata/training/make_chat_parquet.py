"""Writes chat.parquet: two conversations, with a column that only one message has.

    python3 make_chat_parquet.py OUT
"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq

rows = [
    {"messages": [{"role": "user", "content": "Hi", "name": "Ada"}, {"role": "assistant", "content": "Yo", "name": None}]},
    {"messages": [{"role": "user", "content": "2+2?", "name": None}, {"role": "assistant", "content": "4", "name": None}]},
]
pq.write_table(pa.Table.from_pylist(rows), sys.argv[1], compression="snappy")
