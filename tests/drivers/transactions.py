"""Detached backups as part of transactions, as applications with psycopg 3 write them.

usage: transactions.py URL (of a node whose own server is a standby)
"""
import sys

import psycopg

INTO = "BACKUP DATABASE movr INTO %s WITH DETACHED"
PLACE = ("nodelocal://1/t",)
url = sys.argv[1]


def status(job):
    with psycopg.connect(url, autocommit=True) as other:
        row = other.execute("SHOW JOB WHEN COMPLETE %s", (job,)).fetchone()
        return row and row[5]


with psycopg.connect(url) as conn:  # autocommit is off: psycopg begins a transaction by itself
    (kept,) = conn.execute(INTO, PLACE).fetchone()
    print(status(kept), conn.execute("SHOW JOB %s", (kept,)).fetchall(), conn.info.transaction_status.name)
    conn.commit()
    print(status(kept))
    (gone,) = conn.execute(INTO, PLACE).fetchone()
    conn.rollback()
    print(status(gone))
    with conn.transaction():
        (outer,) = conn.execute(INTO, PLACE).fetchone()
        try:
            with conn.transaction():
                (inner,) = conn.execute(INTO, PLACE).fetchone()
                raise ValueError
        except ValueError:
            pass
        with conn.transaction():
            (nested,) = conn.execute(INTO, PLACE).fetchone()
    print(status(outer), status(inner), status(nested))
    try:
        conn.execute("BACKUP DATABASE movr INTO %s", PLACE)
    except psycopg.Error as error:
        print(error.sqlstate, error.diag.message_primary)
    conn.rollback()
    with conn.pipeline():
        job = conn.execute(INTO, PLACE)
        conn.execute("SELECT 1")
        conn.commit()
        (job,) = job.fetchone()
    print(status(job))

with psycopg.connect(url, autocommit=True) as conn:
    try:
        with conn.pipeline():
            job = conn.execute(INTO, PLACE)
            (gone,) = job.fetchone()
            conn.execute("SELECT 1 / 0")
    except psycopg.Error as error:
        print(error.sqlstate, status(gone))
    print(status(conn.execute(INTO, PLACE).fetchone()[0]))

with psycopg.connect(url, autocommit=True, options="-c backhaul.target=local") as conn:
    print(status(conn.execute(INTO, PLACE).fetchone()[0]), conn.execute("SELECT pg_is_in_recovery()").fetchone()[0])
    try:
        with conn.transaction():
            conn.execute(INTO, PLACE)
    except psycopg.Error as error:
        print(error.sqlstate, error.diag.message_primary)
