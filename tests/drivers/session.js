// What an application does with node-postgres, printed; run on a server and through a node, the two must print the same.
// usage: node session.js URL [ours | backup]
const { Client, types } = require("pg");

async function main() {
  const client = new Client({ connectionString: process.argv[2] });
  await client.connect();
  const show = (result) => console.log(JSON.stringify(result.rows), result.command, result.rowCount);
  if (process.argv[3] === "ours") {
    show(await client.query("SHOW LOCALITY"));
    show(await client.query({ text: "SHOW LOCALITY", name: "locality" }));
    show(await client.query({ text: "SHOW LOCALITY", name: "locality" }));
    show(await client.query({ text: "SHOW LOCALITY", rowMode: "array", values: [] }));
    await client.query("SHOW LOCALITY now").catch((e) => console.log(e.code, e.message, e.position, e.hint));
    return client.end();
  }
  if (process.argv[3] === "backup") {
    const into = "BACKUP DATABASE movr INTO $1 WITH EXECUTION LOCALITY = $2";
    const where = ["nodelocal://1/d", "region=us-west-1"];
    const made = await client.query(`${into}, DETACHED`, where);
    console.log(JSON.stringify(made.fields.map((field) => field.name)), made.command);
    const done = await client.query("SHOW JOB WHEN COMPLETE $1", [made.rows[0].job_id]);
    console.log(done.rows[0].job_type, done.rows[0].status, done.rows[0].fraction_completed);
    await client.query(into, where).catch((e) => console.log(e.code, /^execution of job \d+ relocated to [34]$/.test(e.message)));
    const text = "BEGIN; BACKUP DATABASE movr INTO 'nodelocal://1/d' WITH DETACHED; COMMIT; SELECT 1 AS one";
    const results = await client.query(text);
    console.log(results.map((result) => result.command).join(" "), results[1].rows[0].job_id.length, results[3].rows[0].one);
    return client.end();
  }
  show(await client.query("SELECT $1::int + 1 AS n, $2::text AS t", [41, "é'\\"]));
  show(await client.query({ name: "named", text: "SELECT * FROM users WHERE city = $1 ORDER BY id LIMIT 3", values: ["zürich"] }));
  show(await client.query({ name: "named", text: "SELECT * FROM users WHERE city = $1 ORDER BY id LIMIT 3", values: ["boston"] }));
  const many = await Promise.all(Array.from({ length: 200 }, (_, i) => client.query("SELECT $1::int * 2 AS n", [i])));
  console.log(many.reduce((sum, result) => sum + result.rows[0].n, 0));
  await client.query("SELECT 1/0").catch((e) => console.log(e.code, e.message));
  await client.query("SELECT * FORM users").catch((e) => console.log(e.code, e.message, e.position));
  await client.query("BEGIN");
  await client.query("CREATE TEMPORARY TABLE t (i int) ON COMMIT DROP");
  show(await client.query("INSERT INTO t SELECT generate_series(1, 10) RETURNING i"));
  await client.query("COMMIT");
  const heard = new Promise((resolve) => client.on("notification", (message) => resolve(message.payload)));
  await client.query("LISTEN js_news");
  await client.query("NOTIFY js_news, 'hello'");
  console.log(await heard);
  const results = await client.query("SELECT 1 AS a; SELECT 2 AS b");
  results.forEach(show);
  await client.end();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
