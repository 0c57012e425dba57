ALTER TABLE registry.jobs
    DROP CONSTRAINT jobs_status_check,
    ADD CONSTRAINT jobs_status_check CHECK (status IN ('pending', 'running', 'paused', 'pause-requested', 'cancel-requested',
                           'reverting', 'succeeded', 'failed', 'canceled', 'undecided'));
COMMENT ON COLUMN registry.jobs.status IS 'undecided: made in a transaction that has not ended; nobody sees such a job or works on it.';

CREATE TABLE registry.transactions (
    job_id    bigint PRIMARY KEY REFERENCES registry.jobs ON DELETE CASCADE,
    gateway   uuid NOT NULL,
    shard     text,
    timeline  integer,
    top       bigint,
    part      bigint,
    made      timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_look timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK (num_nulls(shard, timeline, top, part) IN (0, 4))
);
COMMENT ON TABLE registry.transactions IS 'What decides an undecided job: a transaction of a client, or, without one, the gateway that has its text.';
COMMENT ON COLUMN registry.transactions.gateway IS 'The session of the node that made the job; while it lives others leave the row to it.';
COMMENT ON COLUMN registry.transactions.top IS 'The number of the whole transaction (xid8).';
COMMENT ON COLUMN registry.transactions.part IS 'That of the subtransaction in which the job was made, or again that of the whole: it commits only with all around it.';
