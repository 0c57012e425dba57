CREATE TABLE registry.external_connection_grants (
    connection text NOT NULL REFERENCES registry.external_connections ON DELETE CASCADE,
    grantee    text NOT NULL,
    privilege  text NOT NULL CHECK (privilege IN ('USAGE', 'DROP')),
    PRIMARY KEY (connection, privilege, grantee)
);
COMMENT ON TABLE registry.external_connection_grants IS 'Who may do what with a named store; public is everybody, and a superuser needs no row. The owner gets its own when the store is named, and may lose them.';
INSERT INTO registry.external_connection_grants (connection, grantee, privilege)
    SELECT name, owner, privilege FROM registry.external_connections, unnest(ARRAY['USAGE', 'DROP']) AS privilege;
