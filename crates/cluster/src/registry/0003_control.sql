ALTER TABLE registry.jobs
    ADD ends_as         text CHECK (ends_as IN ('failed', 'canceled')),
    ADD reverting_since timestamptz,
    ADD pause_reason    text,
    ADD pausepoints     text[] NOT NULL DEFAULT '{}',
    ADD exclusive       text UNIQUE;
COMMENT ON COLUMN registry.jobs.exclusive IS 'What no two jobs may have: the directory of a backup.';
COMMENT ON COLUMN registry.jobs.ends_as IS 'Set when a job begins to revert: what it will be when what it made is removed.';
COMMENT ON COLUMN registry.jobs.pausepoints IS 'Where it stops, for tests and demonstrations: name pauses it there, name:hold keeps it there until the text is taken out.';

CREATE TABLE registry.incarnations (
    timeline text NOT NULL,
    started  timestamptz NOT NULL,
    since    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (timeline, started)
);
COMMENT ON TABLE registry.incarnations IS 'Since when nodes have seen this registry on this timeline, since this start of its server: for one session life from then on claims of the dead are left alone.';
