"""Statements of Backhaul through psycopg 3, in every way that it can send one.

usage: ours.py URL
"""
import sys

import psycopg

with psycopg.connect(sys.argv[1], autocommit=True) as conn:
    for binary in (False, True):
        with conn.cursor(binary=binary) as cur:
            cur.execute("SHOW LOCALITY")
            print(cur.description[0].name, cur.description[0].type_code, cur.fetchall(), cur.statusmessage)
            cur.execute("SHOW NODES")
            print([type(value).__name__ for value in cur.fetchone()], cur.rowcount)
    for _ in range(3):
        print(conn.execute("SHOW LOCALITY", prepare=True).fetchone())
    with conn.pipeline():
        rows = [
            conn.execute("SELECT 1"),
            conn.execute("SHOW LOCALITY"),
            conn.execute("SELECT 2"),
            conn.execute("SHOW LOCALITY"),
        ]
        print([cur.fetchone()[0] for cur in rows])
    try:
        conn.execute("SHOW LOCALITY now")
    except psycopg.Error as error:
        print(error.sqlstate, error.diag.message_primary, error.diag.statement_position, error.diag.message_hint)
    try:
        with conn.transaction():
            conn.execute("CREATE TABLE never (i int)")
            conn.execute("SHOW NODES 'x'")
    except psycopg.Error as error:
        print(error.sqlstate, conn.info.transaction_status.name)
    print(conn.execute("SELECT to_regclass('never')").fetchone())
