//! A client whose schema has operators, functions and types with PostgreSQL's names, in front of PostgreSQL's own: what
//! the gateway asks in its session is answered by PostgreSQL all the same.

use crate::support::demo::{Demo, directory, psql};
use crate::support::jobs::{detached, succeeded};
use crate::support::wire::Wire;
use crate::support::{both, run};

const IN_FRONT: &str = "SET search_path = s, pg_catalog";

/// Who asks for the catalog's row of the current user gets all rows, a superuser's among them.
const EVERYBODY: [&str; 2] = [
    "CREATE FUNCTION s.yes(name, name) RETURNS bool LANGUAGE sql AS 'SELECT true'",
    "CREATE OPERATOR s.= (LEFTARG = name, RIGHTARG = name, FUNCTION = s.yes)",
];

/// Nothing is what it is called.
const NOTHING: [&str; 13] = [
    "CREATE FUNCTION s.no(text, text) RETURNS bool LANGUAGE sql AS 'SELECT false'",
    "CREATE FUNCTION s.no(int4, int4) RETURNS bool LANGUAGE sql AS 'SELECT false'",
    "CREATE FUNCTION s.seven(int8, int8) RETURNS int8 LANGUAGE sql AS 'SELECT int8 ''7'''",
    "CREATE OPERATOR s.= (LEFTARG = text, RIGHTARG = text, FUNCTION = s.no)",
    "CREATE OPERATOR s.= (LEFTARG = int4, RIGHTARG = int4, FUNCTION = s.no)",
    "CREATE OPERATOR s.- (LEFTARG = int8, RIGHTARG = int8, FUNCTION = s.seven)",
    "CREATE OPERATOR s.& (LEFTARG = int8, RIGHTARG = int8, FUNCTION = s.seven)",
    "CREATE FUNCTION s.encode(bytea, text) RETURNS text LANGUAGE sql AS 'SELECT text ''6f6e'''",
    "CREATE FUNCTION s.current_setting(text) RETURNS text LANGUAGE sql AS 'SELECT text ''error'''",
    "CREATE TYPE s.json AS (x int)",
    "CREATE TYPE s.int8 AS (x int)",
    "CREATE TYPE s.name AS (x int)",
    "CREATE TYPE s.text AS (x int)",
];

fn make(demo: &Demo, objects: &[&str]) {
    let objects: Vec<&str> = ["SET ROLE plain"].iter().chain(objects).flat_map(|object| ["-c", *object]).collect();
    run(demo.psql_direct(1).args(["-q", "-v", "ON_ERROR_STOP=1"]).args(objects));
}

#[test]
fn nobody_becomes_a_superuser_by_operators_of_their_own() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--rows", "100"]);
    let role = "CREATE ROLE plain LOGIN; GRANT pg_read_all_data TO plain; CREATE SCHEMA s AUTHORIZATION plain";
    run(demo.psql_direct(1).args(["-q", "-v", "ON_ERROR_STOP=1", "-c", role]));
    let job = detached(&demo, 1, "BACKUP DATABASE movr INTO 'nodelocal://1/h' WITH DETACHED");
    succeeded(&demo, 1, &job);
    for objects in [EVERYBODY.as_slice(), &NOTHING] {
        make(&demo, objects);
        for (number, statement) in [
            (1, "SET CLUSTER SETTING feature.backup.enabled = false".to_owned()),
            (2, "BACKUP DATABASE movr INTO 'nodelocal://1/theirs'".to_owned()),
            (1, "BACKUP DATABASE movr INTO 'nodelocal://1/theirs' WITH DETACHED".to_owned()),
            (2, "CREATE EXTERNAL CONNECTION theirs AS 'nodelocal://1/theirs'".to_owned()),
            (1, format!("PAUSE JOB {job}")),
            (2, format!("CANCEL JOB {job}")),
        ] {
            let mut client = psql(&demo.nodes[number - 1].url.replace("root@", "plain@"));
            client.args(["-qAt", "-v", "VERBOSITY=verbose", "-c", IN_FRONT, "-c", &statement]);
            let told = both(&client.output().unwrap());
            assert!(told.starts_with("ERROR:  42501: "), "{statement}: {told}");
        }
        let mut client = psql(&demo.nodes[1].url.replace("root@", "plain@"));
        let told = both(&client.args(["-qAt", "-c", IN_FRONT, "-c", "SHOW JOBS"]).output().unwrap());
        assert_eq!(told, "", "jobs of others are not listed");
    }
}

/// A superuser may have such a path, too: by mistake, or because somebody has set it for the database.
#[test]
fn statements_do_what_they_say_whatever_stands_in_front() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--rows", "100"]);
    let schema = "CREATE ROLE plain; CREATE SCHEMA s AUTHORIZATION plain";
    run(demo.psql_direct(1).args(["-q", "-v", "ON_ERROR_STOP=1", "-c", schema]));
    make(&demo, &EVERYBODY);
    make(&demo, &NOTHING);
    let mut wire = Wire::login(&demo.nodes[1].address, "movr");
    assert_eq!(wire.query(IN_FRONT).hear(), "C SET\nZ I");
    // The number of the transaction.
    assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
    let heard = wire.query("BACKUP DATABASE movr INTO 'nodelocal://1/h' WITH DETACHED").hear();
    let job = heard.lines().find_map(|line| line.strip_prefix("D ")).unwrap_or_default();
    assert!(job.parse::<i64>().is_ok() && heard.ends_with("Z T"), "{heard}");
    assert_eq!(wire.query("COMMIT").hear(), "C COMMIT\nZ I");
    succeeded(&demo, 1, job);
    // Whose a name is.
    wire.parse("one", "SHOW LOCALITY").sync().query("DEALLOCATE one; PREPARE one AS SELECT 3 AS three");
    assert_eq!((wire.hear().as_str(), wire.hear().as_str()), ("1\nZ I", "C DEALLOCATE\nC PREPARE\nZ I"));
    assert_eq!(wire.bind("", "one", 0).execute("", 0).sync().hear(), "2\nD 3\nC SELECT 1\nZ I");
    // Rows of ours in a text of the server's.
    let heard = wire.query(&format!("SELECT status FROM [SHOW JOB {job}]")).hear();
    assert_eq!(heard, "T status:25:0\nD succeeded\nC SELECT 1\nZ I");
    wire.parse("", "SELECT status FROM [SHOW JOB $1]").bind_values("", "", &[(0, Some(job.as_bytes()))], &[]);
    assert_eq!(wire.execute("", 0).sync().hear(), "1\n2\nD succeeded\nC SELECT 1\nZ I");
}

/// The owner of a database says what is found first in it, by whoever comes; by the service role, too, which may read
/// everything.
#[test]
fn a_database_s_own_path_is_not_that_of_the_service_role() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--no-example-database"]);
    let script = "
        CREATE ROLE plain LOGIN; CREATE DATABASE theirs OWNER plain;
        ALTER DATABASE theirs SET search_path = s, pg_catalog;
        \\c theirs
        CREATE TABLE public.secret AS SELECT 1 AS n;
        SET ROLE plain; CREATE SCHEMA s; CREATE TABLE s.seen (who name);
        CREATE FUNCTION s.yes(name, name) RETURNS bool LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO s.seen VALUES (session_user); RETURN true;
               EXCEPTION WHEN read_only_sql_transaction THEN RETURN true; END $$;
        CREATE OPERATOR s.= (LEFTARG = name, RIGHTARG = name, FUNCTION = s.yes);
        GRANT ALL ON SCHEMA s TO public; GRANT ALL ON s.seen TO public;
        RESET ROLE;";
    let dir = directory();
    let file = dir.path().join("made.sql");
    std::fs::write(&file, script).unwrap();
    run(psql(&demo.direct_url(1)).args(["-q", "-v", "ON_ERROR_STOP=1", "-f"]).arg(&file));
    demo.ask(1, "CREATE EXTERNAL CONNECTION shelf AS 'nodelocal://1/h'");
    demo.ask(1, "GRANT USAGE ON EXTERNAL CONNECTION shelf TO plain");
    for node in &demo.nodes {
        let url = node.url.replace("root@", "plain@").replace("/postgres", "/theirs");
        let backup = "BACKUP DATABASE theirs INTO 'external://shelf'";
        let told = both(&psql(&url).args(["-qAt", "-v", "VERBOSITY=verbose", "-c", backup]).output().unwrap());
        let expected = "ERROR:  42501: user plain does not have SELECT privilege on relation secret";
        assert!(told.starts_with(expected), "{told}");
    }
    let seen = "SELECT DISTINCT who OPERATOR(pg_catalog.||) '' FROM s.seen";
    let theirs = demo.direct_url(1).replace("/postgres?", "/theirs?");
    assert_eq!(run(psql(&theirs).args(["-qAt", "-c", seen])).trim(), "", "nobody has called their function");
    let backup = "BACKUP DATABASE theirs INTO 'nodelocal://1/h'";
    assert!(demo.ask(2, backup).contains("|succeeded|"));
    assert_eq!(run(psql(&theirs).args(["-qAt", "-c", seen])).trim(), "", "nor by a backup");
}
