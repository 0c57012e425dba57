"""BACKUP and its jobs through psycopg 3: parameters, types, pipelines, and the error of a relocation.

usage: backup.py URL (of a node outside us-west-1)
"""
import sys

import psycopg

INTO = "BACKUP DATABASE movr INTO %s WITH EXECUTION LOCALITY = %s"

with psycopg.connect(sys.argv[1], autocommit=True) as conn:
    for binary in (False, True):
        cur = conn.cursor(binary=binary)
        cur.execute(INTO + ", DETACHED", ("nodelocal://1/d", "region=us-west-1"))
        print([column.name for column in cur.description], cur.statusmessage)
        (job,) = cur.fetchone()
        print(type(job).__name__, len(str(job)))
        cur.execute("SHOW JOB WHEN COMPLETE %s", (job,))
        row = cur.fetchone()
        print([type(value).__name__ for value in row])
        print(row[0] == job, row[1], row[5], row[11], row[12] == "", row[13] in (3, 4), row[18])
    cur = conn.execute(INTO, ("nodelocal://1/d", ""), prepare=True)
    print([type(value).__name__ for value in cur.fetchone()], [column.name for column in cur.description])
    try:
        conn.execute(INTO, ("nodelocal://1/d", "region=us-west-1"))
    except psycopg.Error as error:
        job = int(error.diag.message_primary.split()[3])
        print(error.sqlstate, error.diag.severity, error.diag.message_hint.startswith("Use SHOW JOB WHEN COMPLETE"))
    with conn.pipeline():
        before = conn.execute("SELECT 1")
        waited = conn.execute("SHOW JOB WHEN COMPLETE %s", (job,))
        none = conn.execute("SHOW JOB %s", (None,))
        after = conn.execute("SELECT 2")
        print(before.fetchone(), waited.fetchone()[5], none.fetchall(), after.fetchone())
    try:
        conn.execute("SHOW JOB %s", ("first",))
    except psycopg.Error as error:
        print(error.sqlstate, error.diag.message_primary)
    print(conn.execute("CANCEL JOBS VALUES (%s), (%s)", (None, None)).statusmessage)
    try:
        conn.execute("PAUSE JOB %s WITH REASON = %s", (job, "too late"))
    except psycopg.Error as error:
        print(error.sqlstate, error.diag.message_primary)
    with conn.transaction():
        print(conn.execute("SHOW JOB WHEN COMPLETE %s", (job,)).fetchone()[5], conn.info.transaction_status.name)
    with conn.pipeline():
        alone = conn.execute(INTO, ("nodelocal://1/d", ""))
    print(alone.fetchone()[1])
    for fetched in (False, True):  # psycopg flushes what is fetched in a pipeline, and the Sync comes at its end
        try:
            with conn.pipeline():
                first = conn.execute(INTO, ("nodelocal://1/d", ""))
                print(first.fetchone() if fetched else conn.execute("SELECT 1").statusmessage)
        except psycopg.Error as error:
            print(error.sqlstate, error.diag.message_primary)
    print(conn.execute("SELECT 'usable'").fetchone())
