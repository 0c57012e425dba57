CREATE TABLE registry.jobs (
    id                 bigint PRIMARY KEY,
    job_type           text NOT NULL,
    description        text NOT NULL,
    statement          text NOT NULL,
    user_name          text NOT NULL,
    status             text NOT NULL DEFAULT 'running' CHECK (status IN ('pending', 'running', 'paused', 'pause-requested',
                           'cancel-requested', 'reverting', 'succeeded', 'failed', 'canceled')),
    running_status     text,
    created            timestamptz NOT NULL DEFAULT clock_timestamp(),
    started            timestamptz,
    finished           timestamptz,
    modified           timestamptz NOT NULL DEFAULT clock_timestamp(),
    fraction_completed double precision NOT NULL DEFAULT 0,
    error              text NOT NULL DEFAULT '',
    filter             text NOT NULL,
    prefers            text[] NOT NULL,
    payload            jsonb NOT NULL,
    sealed             bytea,
    result             jsonb,
    claim_id           uuid,
    claim_session      uuid,
    coordinator_id     integer,
    num_runs           bigint NOT NULL DEFAULT 0,
    last_run           timestamptz,
    next_run           timestamptz,
    unmatched_since    timestamptz,
    execution_errors   text[] NOT NULL DEFAULT '{}'
);
CREATE INDEX jobs_unfinished ON registry.jobs (created DESC) WHERE finished IS NULL;
COMMENT ON TABLE registry.jobs IS 'Every job; a row is written through its claim only, but for its creation and control requests.';
COMMENT ON COLUMN registry.jobs.sealed IS 'What only nodes may read: URIs with their keys, encrypted with the cluster secret.';
COMMENT ON COLUMN registry.jobs.claim_id IS 'Who may work on it: never used twice, whatever sessions and epochs do.';

CREATE TABLE registry.job_info (
    job_id  bigint NOT NULL REFERENCES registry.jobs ON DELETE CASCADE,
    key     text NOT NULL,
    value   jsonb NOT NULL,
    written timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (job_id, key)
);
COMMENT ON TABLE registry.job_info IS 'What a job''s next coordinator has to know.';

CREATE TABLE registry.external_connections (
    name     text PRIMARY KEY,
    uri      bytea NOT NULL,
    redacted text NOT NULL,
    owner    text NOT NULL,
    created  timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE registry.external_connections IS 'Named stores; the URI is encrypted with the cluster secret.';
