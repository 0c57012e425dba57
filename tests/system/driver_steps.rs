//! One script of steps, through every driver that an application may have: it must not matter which.
//!
//! The steps: BACKUP with parameters, attached; the error of a relocation, with all its fields; DETACHED, beside a
//! statement of PostgreSQL's; SHOW JOB WHEN COMPLETE, whose values have their types; a wait that is cancelled, after
//! which the job is; and a connection that is as good as before. Each driver prints the same lines.

use std::cell::Cell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use sqlx::postgres::PgDatabaseError;
use sqlx::{Column as _, Connection as _, Executor as _, PgConnection, Row as _};
use tokio::io::AsyncReadExt as _;
use tokio_postgres::{CancelToken, NoTls};

use super::drivers::{drivers, script};
use crate::support::demo::{Demo, directory};
use crate::support::{both, run};

/// G12: DETAIL and HINT of the relocation are added on purpose, since CockroachDB has none: that the job runs on, and how to go
/// on.
const STEPS: &str = "\
job_id status fraction_completed rows index_entries bytes
succeeded true true true
XXUUU|ERROR|execution of job ID relocated to NODE|The job goes on there; only this statement's wait for it has ended.|\
Use SHOW JOB WHEN COMPLETE ID to wait for its end, or give the option DETACHED to be told the id only.
job_id 19 1
true BACKUP succeeded true true true
canceled 57014
1
canceled
usable
";

/// G5: the filter is a parameter.
const BACKUP: &str = "BACKUP DATABASE movr INTO $1 WITH EXECUTION LOCALITY = $2";

/// What takes the steps through one driver, given a collection, and gives what was printed.
type Steps<'s> = dyn Fn(&str) -> String + Sync + 's;

/// Python and JavaScript write truth in their own ways; which of two nodes a job goes to is the fleet's to choose.
fn same_for_all(printed: &str) -> String {
    let nodes = printed.replace("relocated to 3", "relocated to NODE").replace("relocated to 4", "relocated to NODE");
    nodes.replace("True", "true")
}

fn python(name: &str, binding: &str, url: &str, into: &str) -> String {
    let mut command = Command::new(drivers().join("venv/bin/python"));
    run(command.env("PSYCOPG_IMPL", binding).arg(script(name)).args([url, into]))
}

#[test]
fn every_driver_takes_the_same_steps() {
    let demo = Demo::start(&["--rows", "300"]);
    let url = demo.nodes[0].url.clone();
    let jdbc = format!("jdbc:{}?user=root", url.replace("root@", ""));
    let java = |into: &str| {
        let mut command = Command::new("java");
        command.args(["-XX:TieredStopAtLevel=1", "-cp", "/usr/share/java/postgresql.jar"]).arg(script("Steps.java"));
        run(command.args([jdbc.as_str(), into]))
    };
    let node_js = |into: &str| {
        let mut command = Command::new("node");
        run(command.env("NODE_PATH", drivers().join("node_modules")).arg(script("steps.js")).args([url.as_str(), into]))
    };
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let steps: [(&str, &Steps<'_>); 7] = [
        ("psycopg, in C", &|into| python("steps_psycopg.py", "binary", &url, into)),
        ("psycopg, in Python", &|into| python("steps_psycopg.py", "python", &url, into)),
        ("asyncpg", &|into| python("steps_asyncpg.py", "", &url, into)),
        ("node-postgres", &node_js),
        ("pgjdbc", &java),
        ("tokio-postgres", &|into| runtime().block_on(tokio_postgres(&url, into))),
        ("sqlx", &|into| runtime().block_on(sqlx(&url, into))),
    ];
    std::thread::scope(|scope| {
        let steps = steps.map(|(driver, steps)| {
            let into = format!("nodelocal://1/{}", driver.replace([',', ' '], "_"));
            (driver, scope.spawn(move || steps(&into)))
        });
        for (driver, printed) in steps {
            assert_eq!(same_for_all(&printed.join().unwrap()), STEPS, "{driver}");
        }
    });
}

async fn tokio_postgres(url: &str, into: &str) -> String {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut said = Vec::new();
    let statement = client.prepare(BACKUP).await.unwrap();
    let names: Vec<&str> = statement.columns().iter().map(|column| column.name()).collect();
    said.push(names.join(" "));
    let row = client.query_one(&statement, &[&into, &""]).await.unwrap();
    let (status, fraction): (&str, f64) = (row.get(1), row.get(2));
    let (rows, bytes): (i64, i64) = (row.get("rows"), row.get("bytes"));
    said.push(format!("{status} {} {} {}", fraction == 1.0, rows > 0, bytes > 0));
    let error = client.query(BACKUP, &[&into, &"region=us-west-1"]).await.unwrap_err();
    let error = error.as_db_error().unwrap();
    let job = error.message().split(' ').nth(3).unwrap();
    let (detail, hint) = (error.detail().unwrap(), error.hint().unwrap());
    let fields = [error.code().code(), error.severity(), error.message(), detail, hint];
    said.push(fields.join("|").replace(job, "ID"));
    let (detached, where_to) = (format!("{BACKUP}, DETACHED"), "region=us-west-1");
    // Both are on their way at once.
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&into, &where_to];
    let (made, one) = tokio::join!(client.query_one(&detached, &parameters), client.query_one("SELECT 1", &[]));
    let (made, one): (_, i32) = (made.unwrap(), one.unwrap().get(0));
    let id: i64 = made.get(0);
    said.push(format!("{} {} {one}", made.columns()[0].name(), id.to_string().len()));
    let row = client.query_one("SHOW JOB WHEN COMPLETE $1", &[&id]).await.unwrap();
    let (job_type, status): (&str, &str) = (row.get(1), row.get("status"));
    let typed = row.try_get::<_, chrono::NaiveDateTime>("created").is_ok();
    let (fraction, errors): (f64, Vec<String>) = (row.get(11), row.get("execution_errors"));
    let same = row.get::<_, i64>(0) == id;
    said.push(format!("{same} {job_type} {status} {} {} {typed}", fraction == 1.0, errors.is_empty()));
    client.batch_execute("SET backhaul.debug_pausepoints = 'backup.after_lock:hold'").await.unwrap();
    let held: i64 = client.query_one(&detached, &[&into, &""]).await.unwrap().get(0);
    client.batch_execute("RESET backhaul.debug_pausepoints").await.unwrap();
    let held_job: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&held];
    let over = Cell::new(false);
    let wait = async {
        let waited = client.query("SHOW JOB WHEN COMPLETE $1", &held_job).await;
        over.set(true);
        waited.unwrap_err()
    };
    let token = client.cancel_token();
    let (waited, ()) = tokio::join!(wait, cancel_until(&over, &token, url));
    said.push(format!("canceled {}", waited.code().unwrap().code()));
    said.push(client.execute("CANCEL JOB $1", &held_job).await.unwrap().to_string());
    let row = client.query_one("SHOW JOB WHEN COMPLETE $1", &held_job).await.unwrap();
    said.push(row.get::<_, &str>("status").to_owned());
    said.push(client.query_one("SELECT 'usable'", &[]).await.unwrap().get::<_, &str>(0).to_owned());
    drop(client);
    connection.await.unwrap().unwrap();
    said.join("\n") + "\n"
}

/// Asks for the cancellation of whatever a client does, again and again until that is over: a request may come before the
/// statement. The connection of each is closed when it has been carried out, so that none comes to the next statement.
async fn cancel_until(over: &Cell<bool>, token: &CancelToken, url: &str) {
    let address = url.split('@').nth(1).and_then(|rest| rest.split('/').next()).unwrap();
    while !over.get() {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        token.cancel_query_raw(&mut stream, NoTls).await.unwrap();
        drop(stream.read_to_end(&mut Vec::new()).await);
    }
}

/// sqlx has no request to cancel: what an application has instead is the session's statement_timeout. Nor has it
/// pipelines, so the two statements follow each other.
async fn sqlx(url: &str, into: &str) -> String {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let mut said = Vec::new();
    let described = connection.describe(BACKUP).await.unwrap();
    let names: Vec<&str> = described.columns().iter().map(sqlx::Column::name).collect();
    said.push(names.join(" "));
    let backup = |where_to: &'static str| sqlx::query(BACKUP).bind(into).bind(where_to);
    let row = backup("").fetch_one(&mut connection).await.unwrap();
    let (status, fraction): (&str, f64) = (row.get(1), row.get(2));
    let (rows, bytes): (i64, i64) = (row.get("rows"), row.get("bytes"));
    said.push(format!("{status} {} {} {}", fraction == 1.0, rows > 0, bytes > 0));
    let error = backup("region=us-west-1").fetch_one(&mut connection).await.unwrap_err();
    let error = error.as_database_error().unwrap().downcast_ref::<PgDatabaseError>();
    let job = error.message().split(' ').nth(3).unwrap();
    let severity = format!("{:?}", error.severity()).to_uppercase();
    let fields = [error.code(), &severity, error.message(), error.detail().unwrap(), error.hint().unwrap()];
    said.push(fields.join("|").replace(job, "ID"));
    let detached = format!("{BACKUP}, DETACHED");
    let made = sqlx::query(&detached).bind(into).bind("region=us-west-1").fetch_one(&mut connection).await.unwrap();
    let one: i32 = sqlx::query_scalar("SELECT 1").fetch_one(&mut connection).await.unwrap();
    let id: i64 = made.get(0);
    said.push(format!("{} {} {one}", made.columns()[0].name(), id.to_string().len()));
    let show = |job: i64| sqlx::query("SHOW JOB WHEN COMPLETE $1").bind(job);
    let row = show(id).fetch_one(&mut connection).await.unwrap();
    let (job_type, status): (&str, &str) = (row.get(1), row.get("status"));
    let typed = row.try_get::<chrono::NaiveDateTime, _>("created").is_ok();
    let (fraction, errors): (f64, Vec<String>) = (row.get(11), row.get("execution_errors"));
    let same = row.get::<i64, _>(0) == id;
    said.push(format!("{same} {job_type} {status} {} {} {typed}", fraction == 1.0, errors.is_empty()));
    connection.execute("SET backhaul.debug_pausepoints = 'backup.after_lock:hold'").await.unwrap();
    let held: i64 = sqlx::query_scalar(&detached).bind(into).bind("").fetch_one(&mut connection).await.unwrap();
    connection.execute("RESET backhaul.debug_pausepoints; SET statement_timeout = '2s'").await.unwrap();
    let waited = show(held).fetch_one(&mut connection).await.unwrap_err();
    said.push(format!("canceled {}", waited.as_database_error().unwrap().code().unwrap()));
    connection.execute("RESET statement_timeout").await.unwrap();
    let canceled = sqlx::query("CANCEL JOB $1").bind(held).execute(&mut connection).await.unwrap();
    said.push(canceled.rows_affected().to_string());
    let row = show(held).fetch_one(&mut connection).await.unwrap();
    said.push(row.get::<&str, _>("status").to_owned());
    said.push(sqlx::query_scalar("SELECT 'usable'").fetch_one(&mut connection).await.unwrap());
    connection.close().await.unwrap();
    said.join("\n") + "\n"
}

#[test]
fn psql_describes_and_watches_what_is_ours() {
    let demo = Demo::start(&["--rows", "300"]);
    let dir = directory();
    let asked = |script: &str| {
        let file = dir.path().join("script.sql");
        std::fs::write(&file, script).unwrap();
        both(&demo.psql(1).arg("-At").arg("-f").arg(&file).output().unwrap())
    };
    let backup = "job_id|bigint\nstatus|text\nfraction_completed|double precision\nrows|bigint\nindex_entries|bigint\n\
                  bytes|bigint\n";
    assert_eq!(asked("BACKUP DATABASE movr INTO $1 \\gdesc\n"), backup);
    let jobs = asked("SHOW JOB WHEN COMPLETE $1 \\gdesc\n");
    assert!(jobs.starts_with("job_id|bigint\njob_type|text\n"), "{jobs}");
    assert!(jobs.ends_with("num_runs|bigint\nexecution_errors|text[]\n"), "{jobs}");
    assert_eq!(jobs.matches("|timestamp without time zone\n").count(), 6, "{jobs}");
    let none = asked("PAUSE ALL BACKUP JOBS \\gdesc\n");
    assert_eq!(none, "The command has no result, or the result has no columns.\n");

    let job = demo.ask(1, "BACKUP DATABASE movr INTO 'nodelocal://1/w' WITH DETACHED");
    assert!(demo.ask(1, &format!("SHOW JOB WHEN COMPLETE {job}")).contains("|succeeded|"));
    for (text, shown) in [
        ("SHOW LOCALITY", "region=us-west-1,zone=b"),
        (&format!("SELECT status FROM [SHOW JOB {job}]"), "succeeded"),
        ("SHOW JOBS", &format!("{job}|BACKUP|")),
    ] {
        // It watches until it is ended.
        let mut psql = demo.psql(4);
        psql.args(["-At", "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut watching = psql.spawn().unwrap();
        writeln!(watching.stdin.as_mut().unwrap(), "{text} \\watch 0.1").unwrap();
        let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
        let seen = lines.by_ref().map_while(Result::ok).filter(|line| line.starts_with(shown)).take(3);
        assert_eq!(seen.count(), 3, "{text}");
        watching.kill().unwrap();
        watching.wait().unwrap();
    }
}
