// The steps of tests/system/driver_steps.rs through node-postgres.
// usage: node steps.js URL (of a node outside us-west-1) COLLECTION
const { Client } = require("pg");

const [url, into] = process.argv.slice(2);
const BACKUP = "BACKUP DATABASE movr INTO $1 WITH EXECUTION LOCALITY = $2";

async function main() {
  const client = new Client({ connectionString: url });
  await client.connect();
  const first = async (text, values) => (await client.query(text, values)).rows[0];
  const made = await client.query(BACKUP, [into, ""]);
  console.log(made.fields.map((field) => field.name).join(" "));
  let row = made.rows[0];
  console.log(row.status, row.fraction_completed === 1, Number(row.rows) > 0, Number(row.bytes) > 0);
  await client.query(BACKUP, [into, "region=us-west-1"]).catch((e) => {
    const job = e.message.split(" ")[3];
    console.log([e.code, e.severity, e.message, e.detail, e.hint].join("|").replaceAll(job, "ID"));
  });
  const detached = await client.query({ name: "d", text: `${BACKUP}, DETACHED`, values: [into, "region=us-west-1"] });
  let job = detached.rows[0].job_id;
  console.log(detached.fields[0].name, job.length, (await first("SELECT 1 AS one")).one);
  row = await first("SHOW JOB WHEN COMPLETE $1", [job]);
  const typed = row.created instanceof Date && typeof row.fraction_completed === "number";
  const errors = row.execution_errors;
  console.log(row.job_id === job, row.job_type, row.status, row.fraction_completed === 1, errors.length === 0, typed);
  await client.query("SET backhaul.debug_pausepoints = 'backup.after_lock:hold'");
  job = (await first(`${BACKUP}, DETACHED`, [into, ""])).job_id;
  await client.query("RESET backhaul.debug_pausepoints");
  // node-postgres documents no way to cancel, so this sends the protocol's own request, with the session's key. Its
  // connection is closed when it has been carried out: none comes to the next statement.
  const cancel = () => new Promise((carriedOut) => {
    const packet = Buffer.alloc(16);
    [16, 80877102, client.processID, client.secretKey].forEach((word, i) => packet.writeInt32BE(word, 4 * i));
    const socket = require("net").connect(client.port, client.host, () => socket.end(packet));
    socket.on("close", carriedOut).resume();
  });
  let over = false;
  const waiting = client.query("SHOW JOB WHEN COMPLETE $1", [job])
    .catch((e) => console.log("canceled", e.code))
    .then(() => { over = true; });
  // The request may come before the statement; then it is for nothing.
  for (; !over; await new Promise((next) => setTimeout(next, 50))) await cancel();
  await waiting;
  // Of "CANCEL JOBS 1" its results keep the first word only.
  client.connection.once("commandComplete", (message) => console.log(message.text.replace("CANCEL JOBS ", "")));
  await client.query("CANCEL JOB $1", [job]);
  console.log((await first("SHOW JOB WHEN COMPLETE $1", [job])).status);
  console.log((await first("SELECT 'usable' AS is")).is);
  await client.end();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
