//! Texts of several statements, ours among PostgreSQL's: one implicit transaction, as PostgreSQL has it, which `BEGIN`
//! makes a block of and which any failure ends.

use crate::support::demo::Demo;
use crate::support::wire::Wire;
use crate::support::{both, until};

const DETACHED: &str = "BACKUP DATABASE movr INTO 'nodelocal://1/s' WITH DETACHED";
const LOCALITY: &str = "T locality:25:0\nD region=us-east-1,zone=a\nC SHOW\n";

/// What is heard, with the id of a job as `ID`; and that id.
fn hear(wire: &mut Wire, text: &str) -> (String, Option<String>) {
    let heard = wire.query(text).hear();
    let is_id = |value: &&str| value.len() == 19 && value.parse::<i64>().is_ok();
    let job = heard.lines().filter_map(|line| line.strip_prefix("D ")).find(is_id).map(str::to_owned);
    (job.iter().fold(heard, |heard, job| heard.replace(job, "ID")), job)
}

/// Waits until it is decided whether a job is.
fn is_there(demo: &Demo, job: &str) -> bool {
    let registry = demo.direct_url(1).replace("/movr?", "/backhaul?");
    let query = format!("SELECT coalesce(max(status), 'none') FROM registry.jobs WHERE id = {job}");
    until("the job to be decided", || {
        let seen = both(&crate::support::demo::psql(&registry).args(["-Atc", &query]).output().unwrap());
        if seen.contains("undecided") { Err(seen) } else { Ok(!seen.contains("none")) }
    })
}

#[test]
fn ours_are_part_of_the_transaction_of_their_text() {
    let demo = Demo::start(&["--nodes", "2", "--rows", "100"]);
    let made = "T job_id:20:0\nD ID\nC BACKUP\n";
    let division = "E SERROR C22012 Mdivision by zero\n";
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "movr");
        for (text, heard, kept) in [
            (format!("BEGIN; {DETACHED}; COMMIT"), format!("C BEGIN\n{made}C COMMIT\nZ I"), true),
            (format!("{DETACHED}; SELECT 1 AS a;"), format!("{made}T a:23:0\nD 1\nC SELECT 1\nZ I"), true),
            (format!("SELECT 1 AS a; {DETACHED}"), format!("T a:23:0\nD 1\nC SELECT 1\n{made}Z I"), true),
            (format!("{DETACHED}; SELECT 1/0; SELECT 2"), format!("{made}{division}Z I"), false),
            (format!("BEGIN; {DETACHED}; ROLLBACK"), format!("C BEGIN\n{made}C ROLLBACK\nZ I"), false),
            (format!("BEGIN; {DETACHED}; SELECT 1/0"), format!("C BEGIN\n{made}{division}Z E"), false),
            ("ROLLBACK; SHOW LOCALITY".to_owned(), format!("C ROLLBACK\n{LOCALITY}Z I"), false),
            // BEGIN takes in what was before it, and COMMIT begins another one.
            (format!("{DETACHED}; BEGIN; ROLLBACK"), format!("{made}C BEGIN\nC ROLLBACK\nZ I"), false),
            (format!("BEGIN; {DETACHED}; COMMIT; SELECT 1/0"), format!("C BEGIN\n{made}C COMMIT\n{division}Z I"), true),
        ] {
            let (told, job) = hear(&mut wire, &text);
            // n2 says another locality.
            let heard = if demo.nodes[0].address == node.address { heard } else { heard.replace("zone=a", "zone=b") };
            assert_eq!(told, heard, "{text}");
            if let Some(job) = job {
                assert_eq!(is_there(&demo, &job), kept, "{text}");
            }
        }
        // A block that the text leaves open.
        let (told, job) = hear(&mut wire, &format!("BEGIN; {DETACHED}"));
        assert_eq!(told, format!("C BEGIN\n{made}Z T"));
        assert_eq!(hear(&mut wire, "COMMIT; SHOW JOBS SELECT 1 WHERE false").0.lines().last(), Some("Z I"));
        assert!(is_there(&demo, &job.unwrap()));
    }
    // psql sends all of -c at once.
    let output = demo.psql(2).args(["-Atc", &format!("BEGIN; {DETACHED}; COMMIT")]).output().unwrap();
    let said = both(&output);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 3 && lines[0] == "BEGIN" && lines[1].len() == 19 && lines[2] == "COMMIT", "{said}");
}

#[test]
fn a_text_is_answered_as_the_server_would() {
    let demo = Demo::start(&["--nodes", "1", "--no-example-database"]);
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    assert_eq!(hear(&mut wire, "CREATE TABLE t (a int)").0, "C CREATE TABLE\nZ I");
    let missing = "E SERROR CXXUUU Mjob with ID 1 does not exist\nZ I";
    let block = "can only be used in transaction blocks";
    for (text, heard) in [
        ("SELECT 1 AS a; SHOW LOCALITY;;", format!("T a:23:0\nD 1\nC SELECT 1\n{LOCALITY}Z I")),
        ("/* é */ INSERT INTO t VALUES (1); PAUSE JOB 1; SELECT 2", format!("C INSERT 0 1\n{missing}")),
        ("TABLE t; SHOW LOCALITY", format!("T a:23:0\nC SELECT 0\n{LOCALITY}Z I")),
        // What does not parse fails before anything is done, where it is ours.
        ("DROP TABLE t; SHOW LOCALITY x", "E SERROR C42601 Mat or near \"x\": syntax error P29\nZ I".to_owned()),
        (
            "SHOW LOCALITY; SELECT 'é', nope",
            format!("{LOCALITY}E SERROR C42703 Mcolumn \"nope\" does not exist P28\nZ I"),
        ),
        (
            "SHOW LOCALITY; SELECT locality FROM [SHOW LOCALITY]; SELECT nope FROM [SHOW LOCALITY]",
            format!(
                "{LOCALITY}{}E SERROR C42703 Mcolumn \"nope\" does not exist P61\nZ I",
                LOCALITY.replace("C SHOW", "C SELECT 1")
            ),
        ),
        (
            "SELECT 1 WHERE false; SHOW JOBS SELECT nope",
            "T ?column?:23:0\nC SELECT 0\nE SERROR C42703 Mcolumn \"nope\" does not exist P40\nZ I".to_owned(),
        ),
        ("SAVEPOINT a; SHOW LOCALITY", format!("E SERROR C25P01 MSAVEPOINT {block}\nZ I")),
        (
            "COMMIT; SHOW LOCALITY",
            format!("N SWARNING C25P01 Mthere is no transaction in progress\nC COMMIT\n{LOCALITY}Z I"),
        ),
        (
            "SHOW JOBS SELECT 1 WHERE false; SET CLUSTER SETTING feature.backup.enabled = false; TABLE t",
            "SET CLUSTER SETTING".to_owned(),
        ),
        ("DELETE FROM t; SHOW LOCALITY $1", "E SERROR C42601 Mat or near \"1\": syntax error P30\nZ I".to_owned()),
        ("DELETE FROM t; SHOW JOB $1", "E SERROR C42P02 Mthere is no parameter $1\nZ I".to_owned()),
    ] {
        let (told, _) = hear(&mut wire, text);
        match heard.as_str() {
            "SET CLUSTER SETTING" => {
                let refused =
                    "E SERROR C25001 MSET CLUSTER SETTING cannot be used inside a multi-statement transaction";
                assert!(told.ends_with(&format!("C SHOW\n{refused}\nZ I")), "{told}");
            }
            heard => assert_eq!(told, heard, "{text}"),
        }
    }
    let vacuum = hear(&mut wire, "SHOW JOBS SELECT 1 WHERE false; VACUUM t").0;
    assert!(vacuum.contains("E SERROR C25001 MVACUUM cannot "), "{vacuum}");
    // In a transaction that has failed.
    assert!(hear(&mut wire, "BEGIN; SHOW LOCALITY; SELECT 1/0").0.ends_with("Z E"));
    assert!(hear(&mut wire, "SHOW LOCALITY; ROLLBACK").0.starts_with("E SERROR C25P02"));
    assert_eq!(hear(&mut wire, "ROLLBACK; SHOW LOCALITY").0, format!("C ROLLBACK\n{LOCALITY}Z I"));
}

#[test]
fn a_text_with_row_sources_may_end_a_transaction_that_has_failed() {
    let demo = Demo::start(&["--nodes", "1", "--no-example-database"]);
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    let rows = LOCALITY.replace("C SHOW", "C SELECT 1");
    for (text, heard) in [
        ("ROLLBACK; SELECT locality FROM [SHOW LOCALITY]", format!("C ROLLBACK\n{rows}Z I")),
        ("COMMIT; SELECT count(*) AS n FROM [SHOW NODES];", "C ROLLBACK\nT n:20:0\nD 1\nC SELECT 1\nZ I".to_owned()),
        (
            "/* é */ ROLLBACK TO a; SELECT nope FROM [SHOW LOCALITY]",
            "C ROLLBACK\nE SERROR C42703 Mcolumn \"nope\" does not exist P31\nZ E".to_owned(),
        ),
        ("ROLLBACK TO a; SELECT locality FROM [SHOW LOCALITY]; COMMIT", format!("C ROLLBACK\n{rows}C COMMIT\nZ I")),
    ] {
        assert_eq!(hear(&mut wire, "BEGIN; SAVEPOINT a").0.lines().last(), Some("Z T"), "{text}");
        assert_eq!(hear(&mut wire, "SELECT nothing").0.lines().last(), Some("Z E"), "{text}");
        // Nothing that has rows of ours ends it itself.
        for refused in [
            "SELECT locality FROM [SHOW LOCALITY]; ROLLBACK",
            "SELECT 1 FROM [SHOW NODES]; ROLLBACK",
            "SELECT 1 FROM [SHOW NODES];",
        ] {
            let told = hear(&mut wire, refused).0;
            assert!(told.starts_with("E SERROR C25P02 ") && told.ends_with("\nZ E"), "{refused}: {told}");
        }
        assert_eq!(hear(&mut wire, text).0, heard, "{text}");
        assert_eq!(hear(&mut wire, "ROLLBACK").0.lines().last(), Some("Z I"), "{text}");
    }
}

#[test]
fn a_copy_in_a_text_reads_what_the_client_sends() {
    let demo = Demo::start(&["--nodes", "1", "--no-example-database"]);
    let mut wire = Wire::login(&demo.nodes[0].address, "postgres");
    assert_eq!(hear(&mut wire, "CREATE TABLE t (a int)").0, "C CREATE TABLE\nZ I");
    let text = "COPY t FROM STDIN; SHOW LOCALITY; COPY t TO STDOUT; COPY t FROM STDIN";
    let heard = wire.query(text).hear_until(|tag| tag == b'G');
    assert_eq!(heard, "G");
    let heard = wire.copy("7\n8\n").hear_until(|tag| tag == b'G');
    assert_eq!(heard, format!("C COPY 2\n{LOCALITY}H\nd\nd\nc\nC COPY 2\nG"));
    assert_eq!(wire.copy("9\n").hear(), "C COPY 1\nZ I");
    // What is sent after a COPY that has failed is nobody's.
    assert_eq!(wire.query("COPY t FROM STDIN; SHOW LOCALITY").hear_until(|tag| tag == b'G'), "G");
    let heard = wire.copy("seven\n").hear();
    assert!(heard.starts_with("E SERROR C22P02") && heard.ends_with("Z I"), "{heard}");
    let heard = hear(&mut wire, "SELECT count(*) AS n FROM t; SHOW LOCALITY").0;
    assert_eq!(heard, format!("T n:20:0\nD 3\nC SELECT 1\n{LOCALITY}Z I"));
}
