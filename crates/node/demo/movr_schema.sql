-- One of every kind of object that a backup has to bring back. Everything is deterministic.

CREATE SCHEMA billing;
COMMENT ON SCHEMA billing IS 'Who owes what';

CREATE TYPE vehicle_kind AS ENUM ('bike', 'scooter', 'skateboard');
CREATE TYPE place AS (lat double precision, lon double precision);
CREATE DOMAIN plate AS text CHECK (VALUE ~ '^[A-Z]{2}-[0-9]+$');

CREATE SEQUENCE ticket_numbers START 1000 INCREMENT 5;

CREATE TABLE users (
    id          uuid PRIMARY KEY,
    city        text NOT NULL,
    name        text,
    address     text,
    credit      numeric,
    rating      double precision,
    member_for  interval,
    born        date,
    signed_up   timestamptz NOT NULL,
    preferences jsonb,
    favourites  text[],
    photo       bytea,
    friend_id   uuid
);
COMMENT ON TABLE users IS 'People who ride: "quoted", with a \ and a
second line';
COMMENT ON COLUMN users.rating IS 'NaN for who never rode';

CREATE TABLE vehicles (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind       vehicle_kind NOT NULL,
    plate      plate NOT NULL UNIQUE,
    owner_id   uuid NOT NULL REFERENCES users (id),
    stands_at  place,
    in_service tstzrange,
    price      numeric(10, 2) NOT NULL,
    tax        numeric(10, 2) GENERATED ALWAYS AS (price * 0.19) STORED,
    last_ride  bigint
);

CREATE TABLE rides (
    id         bigserial PRIMARY KEY,
    vehicle_id bigint NOT NULL REFERENCES vehicles (id),
    rider_id   uuid NOT NULL REFERENCES users (id),
    began      timestamptz NOT NULL,
    ended      timestamptz,
    revenue    numeric(12, 2),
    route      text
);
CREATE INDEX rides_by_rider ON rides (rider_id, began DESC);

-- Two foreign keys that go in a circle, and one from a table to itself.
ALTER TABLE vehicles ADD CONSTRAINT vehicles_last_ride FOREIGN KEY (last_ride) REFERENCES rides (id)
    DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE users ADD CONSTRAINT users_friend FOREIGN KEY (friend_id) REFERENCES users (id)
    DEFERRABLE INITIALLY DEFERRED;

CREATE TABLE vehicle_positions (
    vehicle_id bigint NOT NULL,
    seen       timestamptz NOT NULL,
    at         place,
    PRIMARY KEY (vehicle_id, seen)
) PARTITION BY RANGE (seen);
CREATE TABLE vehicle_positions_2025 PARTITION OF vehicle_positions
    FOR VALUES FROM ('2025-01-01 00:00:00+00') TO ('2026-01-01 00:00:00+00');
CREATE TABLE vehicle_positions_2026 PARTITION OF vehicle_positions
    FOR VALUES FROM ('2026-01-01 00:00:00+00') TO ('2027-01-01 00:00:00+00');
CREATE TABLE vehicle_positions_rest PARTITION OF vehicle_positions DEFAULT;

CREATE TABLE contracts (id integer PRIMARY KEY, body text NOT NULL, seal bytea);
ALTER TABLE contracts ALTER COLUMN body SET STORAGE EXTERNAL;
CREATE TABLE app_log (at timestamptz, line text);
CREATE TABLE promo_codes (code text PRIMARY KEY, expires timestamptz);
CREATE UNLOGGED TABLE sessions_cache (token text PRIMARY KEY, user_id uuid);

CREATE TABLE billing."Invoices" (
    "Id"     integer PRIMARY KEY,
    "userId" uuid NOT NULL REFERENCES users (id),
    "Total € owed" numeric NOT NULL,
    big      numeric,
    "select" real
);

CREATE FUNCTION ride_minutes(ride rides) RETURNS numeric LANGUAGE sql STABLE
    AS $$ SELECT extract(epoch FROM ride.ended - ride.began) / 60 $$;

CREATE FUNCTION note_ride() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO app_log VALUES (NEW.began, format('ride %s', NEW.id));
    RETURN NEW;
END $$;
CREATE TRIGGER rides_noted AFTER INSERT ON rides FOR EACH ROW WHEN (NEW.id % 100 = 0) EXECUTE FUNCTION note_ride();

CREATE VIEW open_rides AS SELECT id, vehicle_id, rider_id, began FROM rides WHERE ended IS NULL;
