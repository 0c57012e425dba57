-- How many rows there are in all, and which of them are this shard's: those whose number leaves this remainder.
CREATE TEMPORARY TABLE part AS
    SELECT greatest(current_setting('movr.rows')::int, 100) AS rides,
           greatest(current_setting('movr.rows')::int / 20, 20) AS users,
           current_setting('movr.shard')::int AS shard, current_setting('movr.shards')::int AS shards;
CREATE FUNCTION pg_temp.uuid_of(kind text, number bigint) RETURNS uuid LANGUAGE sql IMMUTABLE
    AS $$ SELECT md5(kind || number)::uuid $$;
CREATE FUNCTION pg_temp.own(number bigint) RETURNS boolean LANGUAGE sql STABLE
    AS $$ SELECT number % shards = shard FROM part $$;
CREATE FUNCTION pg_temp.own_number(number bigint, total bigint) RETURNS bigint LANGUAGE sql STABLE
    AS $$ SELECT CASE WHEN own > total THEN own - shards WHEN own < 1 THEN own + shards ELSE own END
          FROM (SELECT number - number % shards + shard AS own, shards FROM part) n $$;

INSERT INTO users
SELECT pg_temp.uuid_of('user', i),
       (ARRAY['new york', 'boston', 'seattle', 'san francisco', 'zürich', '東京'])[i % 6 + 1],
       CASE i % 7 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN E'Zoë "the\tRider" O''Hara' WHEN 3 THEN '山田 太郎 🛵'
                  ELSE 'User ' || i END,
       CASE i % 5 WHEN 0 THEN E'1 Back\\slash Way\nFloor 2\r\nDoor 3' WHEN 1 THEN E'\\N' WHEN 2 THEN NULL
                  ELSE i || ' Main St' END,
       CASE i % 6 WHEN 0 THEN 'NaN' WHEN 1 THEN 123456789012345678901234567890.123456789 WHEN 2 THEN -0.00001
                  WHEN 3 THEN NULL ELSE i * 1.5 END,
       CASE i % 6 WHEN 0 THEN 'NaN' WHEN 1 THEN 'Infinity' WHEN 2 THEN '-Infinity' WHEN 3 THEN '-0'
                  WHEN 4 THEN 1e-300 ELSE i / 3.0::float8 END,
       CASE i % 4 WHEN 0 THEN NULL ELSE i * interval '1 month 2 days 03:04:05.678901' END,
       date '1970-01-01' + i,
       CASE i % 9 WHEN 0 THEN 'infinity' WHEN 1 THEN '-infinity' ELSE timestamptz '2025-01-01 00:00:00+00' + i * interval '1 minute' END,
       CASE i % 3 WHEN 0 THEN NULL
                  ELSE jsonb_build_object('theme', 'dark', 'n', i, 'text', E'a"b\\c\n', 'list', jsonb_build_array(1, NULL, 'x')) END,
       CASE i % 4 WHEN 0 THEN NULL WHEN 1 THEN '{}' ELSE ARRAY['a,b', 'c"d', NULL, '{e}', E'f\\g'] END,
       CASE i % 3 WHEN 0 THEN NULL ELSE decode(md5('photo' || i) || '00ff5c', 'hex') END,
       NULL
FROM part, generate_series(1, users) i WHERE pg_temp.own(i);
UPDATE users SET friend_id = (SELECT id FROM users other ORDER BY id LIMIT 1) WHERE city IN ('zürich', '東京');

INSERT INTO vehicles (kind, plate, owner_id, stands_at, in_service, price)
SELECT (ARRAY['bike', 'scooter', 'skateboard'])[i % 3 + 1]::vehicle_kind, 'MV-' || i,
       pg_temp.uuid_of('user', pg_temp.own_number(i, users)),
       CASE i % 5 WHEN 0 THEN NULL ELSE ROW(40 + i % 10, -74 + i % 7)::place END,
       CASE i % 4 WHEN 0 THEN 'empty'::tstzrange WHEN 1 THEN tstzrange(NULL, '2026-01-01 00:00:00+00')
                  ELSE tstzrange('2025-01-01 00:00:00+00', NULL) END,
       i % 90 + 0.99
FROM part, generate_series(1, users) i WHERE pg_temp.own(i);

CREATE TEMPORARY TABLE fleet AS SELECT row_number() OVER (ORDER BY id) - 1 AS n, id FROM vehicles;
CREATE TEMPORARY TABLE fleet_size AS SELECT count(*) AS vehicles FROM fleet;
ANALYZE fleet;
INSERT INTO rides (vehicle_id, rider_id, began, ended, revenue, route)
SELECT fleet.id,
       md5('user' || CASE WHEN own > users THEN own - shards WHEN own < 1 THEN own + shards ELSE own END)::uuid,
       timestamptz '2025-06-01 00:00:00+00' + i * interval '7 seconds',
       CASE i % 50 WHEN 0 THEN NULL ELSE timestamptz '2025-06-01 00:00:00+00' + i * interval '7 seconds' + interval '11 minutes' END,
       CASE i % 13 WHEN 0 THEN NULL ELSE (i % 5000) / 100.0 END,
       repeat(md5('route' || i), 8)
FROM part CROSS JOIN fleet_size CROSS JOIN generate_series(1, rides) i
     CROSS JOIN LATERAL (SELECT (i % users + 1) - (i % users + 1) % shards + shard AS own) rider
     JOIN fleet ON fleet.n = i % vehicles
WHERE i % shards = shard ORDER BY i;
UPDATE vehicles SET last_ride = last.id
FROM (SELECT vehicle_id, max(id) AS id FROM rides GROUP BY vehicle_id) last
WHERE last.vehicle_id = vehicles.id AND kind = 'bike';

INSERT INTO vehicle_positions
SELECT fleet.id, timestamptz '2024-12-20 00:00:00+00' + i * interval '31 hours', ROW(i, -i)::place
FROM part CROSS JOIN fleet_size CROSS JOIN generate_series(1, least(users, 1000)) i
     JOIN fleet ON fleet.n = i % vehicles
WHERE i % shards = shard;

-- Too wide for a page, and not to be compressed: these live in TOAST.
INSERT INTO contracts
SELECT i, (SELECT string_agg(md5(i || '-' || k), E'\n') FROM generate_series(1, 400) k), decode(md5('seal' || i), 'hex')
FROM generate_series(1, 20) i;
INSERT INTO sessions_cache SELECT md5('token' || i), NULL FROM generate_series(1, 10) i;
INSERT INTO billing."Invoices"
SELECT i, pg_temp.uuid_of('user', i), i * 10.5, 10::numeric ^ (i % 30), 'NaN'
FROM part, generate_series(1, users) i WHERE pg_temp.own(i);

CREATE MATERIALIZED VIEW revenue_by_city AS
    SELECT u.city, count(*) AS rides, sum(r.revenue) AS revenue
    FROM rides r JOIN users u ON u.id = r.rider_id GROUP BY u.city;
CREATE UNIQUE INDEX ON revenue_by_city (city);

SELECT nextval('ticket_numbers') FROM generate_series(1, 3);
SELECT lo_from_bytea(16500, convert_to(repeat('a large object, ünïcode ', 5000), 'UTF8'));
COMMENT ON LARGE OBJECT 16500 IS 'The terms of use';
DROP TABLE part, fleet, fleet_size;
ANALYZE;
