"""The steps of tests/system/driver_steps.rs through psycopg 3; they are in a pipeline where that makes sense.

usage: steps_psycopg.py URL (of a node outside us-west-1) COLLECTION
"""
import datetime
import sys
import threading

import psycopg

url, into = sys.argv[1:]
BACKUP = "BACKUP DATABASE movr INTO %s WITH EXECUTION LOCALITY = %s"
with psycopg.connect(url, autocommit=True) as conn:
    cur = conn.execute(BACKUP, (into, ""))
    print(" ".join(column.name for column in cur.description))
    row = cur.fetchone()
    print(row[1], row[2] == 1, row[3] > 0, row[5] > 0)
    try:
        conn.execute(BACKUP, (into, "region=us-west-1"))
    except psycopg.Error as error:
        said = error.diag
        job = int(said.message_primary.split()[3])
        fields = [error.sqlstate, said.severity, said.message_primary, said.message_detail, said.message_hint]
        print("|".join(fields).replace(str(job), "ID").rstrip())
    with conn.pipeline():
        made = conn.execute(BACKUP + ", DETACHED", (into, "region=us-west-1"))
        one = conn.execute("SELECT 1")
        (job,) = made.fetchone()
        print(made.description[0].name, len(str(job)), one.fetchone()[0])
    row = conn.execute("SHOW JOB WHEN COMPLETE %s", (job,), binary=True).fetchone()
    kinds = (int, str, datetime.datetime, float, list)
    typed = [isinstance(row[at], kind) for at, kind in zip((0, 1, 7, 11, 18), kinds)]
    print(row[0] == job, row[1], row[5], row[11] == 1, row[18] == [], typed == [True] * 5)
    conn.execute("SET backhaul.debug_pausepoints = 'backup.after_lock:hold'")
    (job,) = conn.execute(BACKUP + ", DETACHED", (into, "")).fetchone()
    conn.execute("RESET backhaul.debug_pausepoints")
    waited = threading.Event()

    def cancel():
        while not waited.wait(0.05):
            conn.cancel_safe()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    try:
        conn.execute("SHOW JOB WHEN COMPLETE %s", (job,))
    except psycopg.errors.QueryCanceled as error:
        print("canceled", error.sqlstate)
    waited.set()
    canceller.join()
    print(conn.execute("CANCEL JOB %s", (job,)).statusmessage.removeprefix("CANCEL JOBS "))
    print(conn.execute("SHOW JOB WHEN COMPLETE %s", (job,)).fetchone()[5])
    print(conn.execute("SELECT 'usable'").fetchone()[0])
