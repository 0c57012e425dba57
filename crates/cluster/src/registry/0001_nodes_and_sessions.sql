CREATE TABLE registry.cluster (
    id         uuid PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    single     boolean NOT NULL DEFAULT true UNIQUE CHECK (single)
);
COMMENT ON TABLE registry.cluster IS 'This cluster, in one row.';

CREATE TABLE registry.shards (
    name              text PRIMARY KEY,
    system_identifier text NOT NULL,
    added_at          timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE registry.shards IS 'Every shard that ever joined; a backup that cannot reach one says so.';

CREATE TABLE registry.nodes (
    id         integer PRIMARY KEY CHECK (id > 0),
    store_id   uuid NOT NULL UNIQUE,
    address    text NOT NULL,
    locality   text NOT NULL,
    shard      text NOT NULL,
    build      text NOT NULL,
    started_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE registry.nodes IS 'Every node that ever joined, as it last described itself.';

CREATE TABLE registry.sessions (
    node_id    integer PRIMARY KEY REFERENCES registry.nodes,
    id         uuid NOT NULL UNIQUE,
    epoch      bigint NOT NULL,
    instance   uuid NOT NULL,
    address    text NOT NULL,
    expires_at timestamptz NOT NULL
);
COMMENT ON TABLE registry.sessions IS 'Who is alive: a node whose session is past its time, on this server''s clock, is not.';

CREATE TABLE registry.settings (
    name  text PRIMARY KEY,
    value text NOT NULL
);
INSERT INTO registry.settings VALUES ('session_life_ms', '10000');
COMMENT ON TABLE registry.settings IS 'Settings of the whole fleet.';
