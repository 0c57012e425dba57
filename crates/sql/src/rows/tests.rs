//! What is a row source, and what is a text that PostgreSQL accepts.

use super::*;

fn read(text: &str) -> Sourced {
    Sourced::read(text).expect(text)
}

#[test]
fn a_show_where_a_table_could_stand_is_a_row_source() {
    for (text, count) in [
        ("SELECT * FROM [SHOW JOBS]", 1),
        ("select * from[show jobs]j", 1),
        ("SELECT 1 FROM t JOIN [SHOW /* x */ JOB 1] ON true", 1),
        ("SELECT 1 FROM t, [SHOW JOBS]", 1),
        ("SELECT 1 FROM ([SHOW JOBS] AS j JOIN t USING (id)), LATERAL [SHOW NODES]", 2),
        ("DELETE FROM t USING [SHOW JOBS] j WHERE j.job_id = id", 1),
        ("WITH j AS (SHOW JOBS) SELECT * FROM j", 1),
        ("WITH j (a) AS NOT MATERIALIZED (SHOW JOB WHEN COMPLETE 1), k AS MATERIALIZED (SHOW NODES) TABLE k", 2),
        (
            "INSERT INTO t SELECT path FROM [SHOW BACKUPS IN 'x'] WHERE path IN (SELECT a FROM [SHOW LOCALITY] AS l(a))",
            2,
        ),
        ("SELECT * FROM [SHOW JOBS SELECT job_id FROM [SHOW JOBS] WHERE a[1] = ']']", 1),
        ("SELECT 1; SELECT 2 FROM [SHOW JOBS];", 1),
        ("EXPLAIN SELECT * FROM [SHOW JOBS]", 1),
        ("CREATE TABLE view AS SELECT * FROM [SHOW JOBS]", 1),
        ("COPY (SELECT * FROM [SHOW JOBS]) TO STDOUT", 1),
    ] {
        assert!(has_row_source(text.as_bytes()), "{text}");
        assert_eq!(read(text).sources().len(), count, "{text}");
    }
}

#[test]
fn what_postgresql_may_accept_is_left_alone() {
    for text in [
        "SELECT 'FROM [SHOW JOBS]'",
        "SELECT 1 AS \"FROM [SHOW JOBS]\" -- FROM [SHOW JOBS]",
        "SELECT 1 /* FROM [SHOW JOBS] */",
        "DO $$ BEGIN PERFORM * FROM [SHOW JOBS]; END $$",
        "SELECT E'\\' FROM [SHOW JOBS]'",
        "SELECT a[show] FROM t",
        "SELECT a[show jobs]",
        "SELECT ARRAY[[jobs], [show]]",
        "SELECT ARRAY[[show, jobs], [show, jobs]]",
        "CREATE TYPE t AS (show jobs)",
        "SELECT * FROM f() AS (show jobs)",
        "WITH a AS (SELECT 1) SELECT * FROM g(2), f(1) AS (show jobs, b int)",
        "SELECT * FROM ROWS FROM (f() AS (show jobs)) WITH ORDINALITY",
        "CREATE TABLE t WITH (fillfactor = 70) AS (SHOW JOBS)",
        "SELECT 1 FROM t WINDOW w AS (show ORDER BY jobs)",
        "SELECT * FROM [SHOW search_path]",
        "SELECT * FROM [SHOW jobs.x]",
        "SELECT * FROM [SHOW \"jobs\"]",
        "SELECT * FROM [SHOW JOBS",
        "SELECT * FROM [SHOW JOBS)",
        "SELECT * FROM [BACKUP DATABASE a INTO 'x']",
        "SELECT [SHOW JOBS]",
        "SELECT (SHOW JOBS)",
        "SELECT 1 FROM (SHOW JOBS)",
        "SHOW JOBS",
        "CREATE TABLE jobs (show int)",
        "",
    ] {
        assert!(!has_row_source(text.as_bytes()), "{text}");
    }
    assert!(!has_row_source(b"SELECT '\xe9 FROM [SHOW JOBS]'"));
    assert!(has_row_source(b"SELECT '\xe9' FROM [SHOW JOBS]"));
}

#[test]
fn queries_take_the_places_of_sources_and_positions_are_led_back() {
    for (text, expected) in [
        ("SELECT é FROM [SHOW JOBS] WHERE x", "SELECT é FROM (Q1é) AS backhaul_rows_1 WHERE x"),
        ("SELECT 1 FROM [SHOW JOBS] j, x", "SELECT 1 FROM (Q1é) j, x"),
        ("SELECT 1 FROM [SHOW JOBS] AS j(a), x", "SELECT 1 FROM (Q1é) AS j(a), x"),
        ("SELECT 1 FROM [SHOW JOBS] \"j\", x", "SELECT 1 FROM (Q1é) \"j\", x"),
        (
            "SELECT 1 FROM [SHOW JOBS] CROSS JOIN [SHOW NODES], x",
            "SELECT 1 FROM (Q1é) AS backhaul_rows_1 CROSS JOIN (Q2) AS backhaul_rows_2, x",
        ),
        ("WITH j AS (SHOW JOBS), k AS (SHOW NODES -- é\n) SELECT x", "WITH j AS (Q1é), k AS (Q2) SELECT x"),
    ] {
        let rewritten = read(text).rewrite(vec!["Q1é".to_owned().into(), "Q2".to_owned().into()]);
        assert_eq!(rewritten.text, expected);
        let place = |text: &str, what: &str| 1 + text[..text.find(what).expect(what)].chars().count();
        for (new, old) in [("x", "x"), ("1é", "SHOW JOBS"), ("SELECT", "SELECT"), ("Q1", "SHOW JOBS")] {
            assert_eq!(rewritten.position(place(expected, new)), place(text, old), "{text}: {new}");
        }
    }
    assert_eq!(read("SELECT 1").rewrite(Vec::new()).position(3), 3);
}

#[test]
fn what_a_source_has_itself_is_found_in_it() {
    for (text, at) in [("SELECT é FROM [SHOW JOBS SELECT 1], x", 20), ("WITH é AS (SHOW JOBS SELECT 1) SELECT x", 16)]
    {
        // The source's "SELECT 1" is put between two letters.
        let inner = Inner { at: 1, length: 8, position: Box::new(|at| at + 10) };
        let rewritten = read(text).rewrite(vec![Put { text: "éSELECT 1é".to_owned(), inner: Some(inner) }]);
        let place = |text: &str, what: &str| 1 + text[..text.find(what).expect(what)].chars().count();
        let one = place(&rewritten.text, "1é");
        assert_eq!(rewritten.position(one), place(text, "1"), "{text}");
        for outside in [one + 1, one - 8] {
            assert_eq!(rewritten.position(outside), place(text, "SHOW"), "{text}");
        }
        assert_eq!(rewritten.position(place(&rewritten.text, "x")), place(text, "x"), "{text}");
        assert!(one > at);
    }
}

#[test]
fn what_cannot_be_is_refused_where_it_stands() {
    let nested = |depth: usize| format!("{}x{}", "SELECT 1 FROM [SHOW JOBS ".repeat(depth), "]".repeat(depth));
    let deep = nested(DEPTH_MAX + 1).replace(" x", " TABLE x");
    for (text, code, position) in [
        ("SELECT 1 FROM [SHOW JOB *]", "42601", 25),
        ("SELECT 'é' FROM [SHOW JOB 'x']", "22P02", 27),
        ("SELECT 1 FROM [SHOW JOBS SELECT 2 FROM [SHOW JOB *]]", "42601", 50),
        ("SELECT 1 FROM [SHOW JOBS; SHOW JOBS]", "42601", 16),
        ("WITH j AS (SHOW JOB 1 2) TABLE j", "42601", 23),
        ("CREATE OR REPLACE TEMP VIEW v AS SELECT * FROM [SHOW JOBS]", "0A000", 49),
        ("SELECT 1; CREATE VIEW v AS SELECT * FROM [SHOW JOBS]", "0A000", 43),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2 FROM [SHOW JOBS]; END", "0A000", 71),
        ("PREPARE p AS SELECT * FROM [SHOW JOBS]", "0A000", 29),
        ("SELECT 1 FROM [SHOW JOB 1 WITH EXECUTION DETAILS]", "0A000", 27),
        (&deep, "53400", 25 * DEPTH_MAX + 16),
    ] {
        assert!(has_row_source(text.as_bytes()), "{text}");
        let error = Sourced::read(text).expect_err(text);
        assert_eq!((error.code.as_str(), error.position), (code, Some(position)), "{text}: {}", error.message);
    }
    assert!(Sourced::read(&nested(DEPTH_MAX).replace(" x", " TABLE x")).is_ok());
}

#[test]
fn a_long_text_is_looked_at_in_one_pass() {
    let one = "SELECT 1 FROM [SHOW JOBS] j WHERE 'x' = '';";
    assert_eq!(read(&one.repeat(10_000)).sources().len(), 10_000);
    assert!(!has_row_source("FROM [SHOW JOBS ".repeat(50_000).as_bytes()));
    assert!(!has_row_source("show".repeat(100_000).as_bytes()));
}
