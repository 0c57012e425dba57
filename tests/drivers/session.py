"""What an application does with psycopg 3, printed; run on a server and through a node, the two must print the same.

usage: session.py URL
"""
import sys

import psycopg
from psycopg.rows import tuple_row

url = sys.argv[1]
with psycopg.connect(url, autocommit=True, row_factory=tuple_row) as conn:
    print(conn.execute("SELECT %s::int + 1, %s::text, %s::jsonb", (41, "é'\\", '{"a": [1, null]}')).fetchone())
    for binary in (False, True):
        with conn.cursor(binary=binary) as cur:
            cur.execute("SELECT id, city, credit, signed_up > '2000-01-01', favourites FROM users ORDER BY id LIMIT 7")
            print([[str(value) for value in row] for row in cur.fetchall()])
    with conn.transaction():
        with conn.cursor(name="server_side") as cur:
            cur.itersize = 100
            cur.execute("SELECT id FROM rides ORDER BY id")
            print(sum(row[0] for row in cur))
    with conn.pipeline() as pipeline:
        cursors = [conn.execute("SELECT %s::int * 2", (i,)) for i in range(200)]
        pipeline.sync()
        print(sum(cur.fetchone()[0] for cur in cursors))
    try:
        with conn.pipeline():
            conn.execute("SELECT 1")
            conn.execute("SELECT 1 / 0")
            conn.execute("SELECT 2")
    except psycopg.Error as error:
        print(type(error).__name__, error.sqlstate)
    print(conn.execute("SELECT 'alive'").fetchone())

    conn.execute("CREATE TEMPORARY TABLE t (i int8, t text)")
    with conn.cursor() as cur:
        with cur.copy("COPY t FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int8", "text"])
            for i in range(1000):
                copy.write_row((i, f"row {i} é"))
        with cur.copy("COPY t TO STDOUT (FORMAT binary)") as copy:
            copy.set_types(["int8", "text"])
            print(sum(row[0] for row in copy.rows()))
        try:
            with cur.copy("COPY t FROM STDIN") as copy:
                copy.write("not a number\tx\n")
        except psycopg.Error as error:
            print(type(error).__name__, error.sqlstate)
        print(cur.execute("SELECT count(*) FROM t").fetchone())

    conn.execute("LISTEN news")
    conn.execute("NOTIFY news, 'hello'")
    print([notify.payload for notify in conn.notifies(timeout=10, stop_after=1)])
    try:
        with conn.transaction():
            conn.execute("SELECT no_such_column")
    except psycopg.Error as error:
        print(error.sqlstate, error.diag.message_primary, error.diag.statement_position)
    for _ in range(12):  # psycopg prepares from the fifth time on
        row = conn.execute("SELECT %s::text || 'x'", ("prepared",), prepare=None).fetchone()
    print(row, psycopg.capabilities.has_pipeline())
