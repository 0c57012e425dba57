-- Named stores (CREATE EXTERNAL CONNECTION). The URI is sealed with the cluster secret; what is shown is kept beside.
CREATE TABLE registry.external_connections (
    name     text PRIMARY KEY,
    uri      bytea NOT NULL,
    redacted text NOT NULL,
    owner    text NOT NULL,
    created  timestamptz NOT NULL DEFAULT clock_timestamp()
);
