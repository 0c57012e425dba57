//! The S3 server of a closed network: moto's, in a namespace of its own. What is in it is gone when the demo ends.

use std::env;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::process::{Child, Command};
use tokio::time::sleep;

use super::network::{Network, STORE_PORT};

/// The program, a part of moto.
const PROGRAM: &str = "moto_server";

/// Where `scripts/prepare --tests` puts it in a checkout.
const IN_CHECKOUT: &str = "target/drivers/venv/bin/moto_server";

/// The bucket that is there from the beginning.
const BUCKET: &str = "backups";

/// A server that has not made its bucket by then is given up; Python takes a while on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// An answer that takes longer is asked for again, until the deadline.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// What is said where there is no S3 server.
pub(super) const MISSING: &str = "no S3 server: moto_server was found neither below target/drivers nor on PATH \
     (pip install 'moto[server]', or scripts/prepare --tests); back up to nodelocal://self/ instead";

/// A running S3 server.
pub(super) struct ObjectStore {
    pub(super) child: Child,
    address: SocketAddr,
    log: PathBuf,
}

/// Starts the server in its namespace, where it is installed. It is not ready yet.
///
/// # Errors
///
/// It cannot be started.
pub(super) fn start(network: &Network, dir: &Path) -> anyhow::Result<Option<ObjectStore>> {
    let Some(program) = find() else { return Ok(None) };
    let place = network.store();
    let log = dir.join("store.log");
    let output = fs::OpenOptions::new().create(true).append(true).open(&log)?;
    let mut command = Command::new(program);
    command.args(["-H", &place.address.to_string(), "-p", &STORE_PORT.to_string()]).process_group(0);
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let child = place.namespace.within(|| command.spawn().context("start the S3 server"))?;
    Ok(Some(ObjectStore { child, address: SocketAddr::new(place.address.into(), STORE_PORT), log }))
}

fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|dir| dir.join(PROGRAM));
    // The release that the tests know comes first.
    let here = env::current_dir().ok().map(|dir| dir.join(IN_CHECKOUT));
    here.into_iter().chain(on_path).find(|program| program.is_file())
}

impl ObjectStore {
    /// Waits until the server has made its bucket.
    ///
    /// # Errors
    ///
    /// It ends instead, or does not answer in time.
    pub(super) async fn ready(&mut self, network: &Network) -> anyhow::Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let namespace = network.store().namespace;
        loop {
            let Err(error) = namespace.within(|| make_bucket(self.address)) else { return Ok(()) };
            if let Some(status) = self.child.try_wait()? {
                bail!("the S3 server ended at its start ({status}); its log is {}", self.log.display());
            }
            if Instant::now() > deadline {
                return Err(error.context(format!("wait for the S3 server; its log is {}", self.log.display())));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// The URI of a path in the bucket, for a statement.
    pub(super) fn uri(&self, path: &str) -> String {
        format!(
            "s3://{BUCKET}/{path}?AWS_ACCESS_KEY_ID=demo&AWS_SECRET_ACCESS_KEY=demo&AWS_REGION=us-east-1&AWS_ENDPOINT=http://{}",
            self.address
        )
    }
}

/// One request does not need an HTTP client.
fn make_bucket(address: SocketAddr) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_DEADLINE)?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
    let request = format!("PUT /{BUCKET} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut status = [0; 12];
    stream.read_exact(&mut status)?;
    match status.ends_with(b"200") {
        true => Ok(()),
        false => bail!("the S3 server answers \"{}\"", String::from_utf8_lossy(&status)),
    }
}
