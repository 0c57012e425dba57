"""The steps of tests/system/driver_steps.rs through asyncpg, which prepares every statement and reads binary results.

usage: steps_asyncpg.py URL (of a node outside us-west-1) COLLECTION
"""
import asyncio
import datetime
import sys

import asyncpg

url, into = sys.argv[1:]
BACKUP = "BACKUP DATABASE movr INTO $1 WITH EXECUTION LOCALITY = $2"


async def cancel(conn):
    """Asks for the cancellation of what a connection does; returns when that has been carried out."""
    loop, params, secret = asyncio.get_running_loop(), conn._params, conn._protocol.backend_secret
    pid = conn.get_server_pid()
    await asyncpg.connect_utils._cancel(
        loop=loop, addr=conn._addr, params=params, backend_pid=pid, backend_secret=secret
    )


async def main():
    conn = await asyncpg.connect(url)
    statement = await conn.prepare(BACKUP)
    print(" ".join(column.name for column in statement.get_attributes()))
    row = await statement.fetchrow(into, "")
    print(row["status"], row["fraction_completed"] == 1, row["rows"] > 0, row["bytes"] > 0)
    try:
        await conn.fetch(BACKUP, into, "region=us-west-1")
    except asyncpg.PostgresError as error:
        job = error.message.split()[3]
        fields = [error.sqlstate, error.severity, error.message, error.detail, error.hint]
        print("|".join(fields).replace(job, "ID"))
    made = await conn.fetchrow(BACKUP + ", DETACHED", into, "region=us-west-1")
    job = made["job_id"]
    print(*made.keys(), len(str(job)), await conn.fetchval("SELECT 1"))
    row = await conn.fetchrow("SHOW JOB WHEN COMPLETE $1", job)
    kinds = (int, str, datetime.datetime, float, list)
    typed = [isinstance(row[at], kind) for at, kind in zip((0, 1, 7, 11, 18), kinds)]
    print(row[0] == job, row["job_type"], row["status"], row[11] == 1, row[18] == [], typed == [True] * 5)
    await conn.execute("SET backhaul.debug_pausepoints = 'backup.after_lock:hold'")
    job = await conn.fetchval(BACKUP + ", DETACHED", into, "")
    await conn.execute("RESET backhaul.debug_pausepoints")
    try:
        # At its end asyncpg sends a cancel request by itself, and keeps what the server says.
        await conn.fetch("SHOW JOB WHEN COMPLETE $1", job, timeout=2)
    except TimeoutError:
        # The same request, to hear it. It may come before the statement; then it is for nothing.
        waiting = asyncio.create_task(conn.fetch("SHOW JOB WHEN COMPLETE $1", job))
        while not waiting.done():
            await cancel(conn)
            await asyncio.wait([waiting], timeout=0.05)
        error = waiting.exception()
        print("canceled", error.sqlstate if isinstance(error, asyncpg.PostgresError) else error)
    print((await conn.execute("CANCEL JOB $1", job)).removeprefix("CANCEL JOBS "))
    print((await conn.fetchrow("SHOW JOB WHEN COMPLETE $1", job))["status"])
    print(await conn.fetchval("SELECT 'usable'"))
    await conn.close()


asyncio.run(main())
