//! A client's session: two streams, and between them frames that pass.
//!
//! One task moves bytes in both directions at once. What was read is digested first ([`crate::server_frames`],
//! [`crate::client_frames`]), which decides frame by frame what passes and what is ours; then the task waits for
//! whichever can move next: either socket to read or to write, a statement of ours to finish, or the world to change.
//! No buffer grows beyond [`BUFFER_MAX`] for long: a side that does not take its bytes stops the reading of the other,
//! so a slow client slows its server exactly as it would without a gateway.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use cluster::View;
use cluster::socket::Socket;
use pgerror::{PgError, SqlState};
use sql::Statement;
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::Gateway;
use crate::answer::{Answer, Writer};
use crate::asking::{Asking, Question};
use crate::cancel::{Cancelable, Registered};
use crate::inbound::Inbound;
use crate::local::Locals;
use crate::pipeline::Pipeline;
use crate::progress::Remarks;
use crate::rows::Sent;
use crate::script::{Origin, Script};
use crate::speech::Speech;
use crate::transactions::Joined;

/// Reading from one side stops while this much waits to be written to the other.
pub(crate) const BUFFER_MAX: usize = 128 * 1024;

/// Room for a read is made when there is less than the first, and then this much more.
const READ_MIN: usize = 8 * 1024;
const READ_SIZE: usize = 32 * 1024;

/// A client that does not take its last words within this time goes without them.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(30);

/// What came of the statements of one text: in order, up to the first that failed.
pub(crate) type Answered = Vec<(Statement, Result<Answer, PgError>)>;

/// What came of a frame of ours.
pub(crate) enum Outcome {
    /// Statements were run.
    Answered(Answered),
    /// A text with rows in it, to be sent on.
    Sent(Result<Box<Sent>, PgError>),
}

/// A statement of ours at work.
pub(crate) struct Running {
    pub(crate) future: Pin<Box<dyn Future<Output = Outcome> + Send>>,
    /// What it came in, and what waits for it.
    pub(crate) origin: Origin,
    /// Whether it is part of a transaction of the client's.
    pub(crate) joins: bool,
    /// What cancels it.
    pub(crate) cancelled: CancellationToken,
}

/// How positions in errors are led back to the client's own text.
pub(crate) struct Places {
    /// The kind of message that ends it, if no error comes before.
    pub(crate) until: u8,
    pub(crate) position: Box<dyn Fn(usize) -> usize + Send>,
}

/// Everything about one client but its sockets.
pub(crate) struct Session {
    pub(crate) gateway: Gateway,
    /// Whether statements may be ours: not on a replication connection, nor on one that another node passed on.
    pub(crate) intercepts: bool,
    /// The server has let the client in.
    pub(crate) greeted: bool,
    /// What the server calls `standard_conforming_strings`; while it is off, texts cannot be read safely.
    pub(crate) conforming_strings: bool,
    /// The client's encoding has bytes of ASCII inside of characters; while that is so, only texts in ASCII are looked into.
    pub(crate) ascii_in_characters: bool,
    /// How the client is spoken to.
    pub(crate) speech: Speech,
    /// The server has said that it ends the connection.
    pub(crate) server_ended: bool,
    /// The client has said good-bye.
    pub(crate) client_ended: bool,
    /// A statement of ours has failed, and the client's frames do not count up to its Sync.
    pub(crate) skipping: bool,
    pub(crate) pipeline: Pipeline,
    pub(crate) locals: Locals,
    /// The jobs that were made in the transaction that is open.
    pub(crate) joined: Joined,
    pub(crate) asking: Option<Asking>,
    pub(crate) running: Option<Running>,
    /// What is left of a text of several statements.
    pub(crate) script: Option<Script>,
    /// What came of the running statement, until it can be told.
    pub(crate) outcome: Option<Outcome>,
    /// What the running statement has to say before its end.
    pub(crate) remarks: Remarks,
    /// Takes the questions of running statements.
    pub(crate) questions: mpsc::Sender<Question>,
    questions_heard: mpsc::Receiver<Question>,
    /// The one that was heard, until it can be put.
    question: Option<Question>,
    /// Set while the server answers a text that is not as the client wrote it.
    pub(crate) places: Option<Places>,
    /// A frame has come in that waits for its turn: a statement of ours, or what is to be sent alone.
    pub(crate) held: bool,
    pub(crate) cancelable: Arc<Cancelable>,
    pub(crate) registered: Option<Registered>,
    pub(crate) from_client: Inbound,
    pub(crate) to_server: BytesMut,
    pub(crate) from_server: Inbound,
    pub(crate) to_client: BytesMut,
}

/// The leader that a session depends on.
pub(crate) struct Follows {
    pub(crate) shard: String,
    pub(crate) instance: Uuid,
}

impl Session {
    pub(crate) fn new(gateway: Gateway, cancelable: Arc<Cancelable>, intercepts: bool) -> Self {
        // A statement asks one question at a time.
        let (questions, questions_heard) = mpsc::channel(1);
        Self {
            gateway,
            intercepts,
            greeted: false,
            conforming_strings: true,
            ascii_in_characters: false,
            speech: Speech::default(),
            server_ended: false,
            client_ended: false,
            skipping: false,
            pipeline: Pipeline::default(),
            locals: Locals::default(),
            joined: Joined::default(),
            asking: None,
            running: None,
            script: None,
            outcome: None,
            remarks: Remarks::default(),
            questions,
            questions_heard,
            question: None,
            places: None,
            held: false,
            cancelable,
            registered: None,
            from_client: Inbound::default(),
            to_server: BytesMut::new(),
            from_server: Inbound::default(),
            to_client: BytesMut::new(),
        }
    }

    /// Relays until either side is done. Errors of the sockets themselves end it silently: there is nobody to tell.
    pub(crate) async fn relay(mut self, client: Socket, server: Socket, follows: Option<Follows>) {
        let (mut client_in, mut client_out) = tokio::io::split(client);
        let (mut server_in, mut server_out) = tokio::io::split(server);
        let mut views = self.gateway.cluster.subscribe();
        // The leader may have changed since the route was chosen.
        views.mark_changed();
        let shutdown = self.gateway.shutdown.clone();
        // Made once: this loop turns for every few bytes that pass.
        let mut stopped = pin!(shutdown.cancelled());
        let mut moved = pin!(moved(&mut views, follows.as_ref()));
        let (mut client_open, mut server_open, mut server_writable) = (true, true, true);
        let (mut client_flushed, mut server_flushed) = (true, true);
        let end: Result<(), PgError> = loop {
            if let Err(error) = self.digest() {
                break Err(error);
            }
            // With room towards the client, all that can be digested of the server's last words has been.
            if !server_open && self.to_client.len() < BUFFER_MAX {
                let expected = self.server_ended || self.client_ended || !client_open;
                break if expected { Ok(()) } else { Err(self.server_lost()) };
            }
            if !client_open && server_writable && self.is_done_with_client() && server_flushed {
                // As a client that closes its side directly: the server finishes what it has and then goes.
                server_writable = false;
                if !matches!(timeout(LAST_WORDS_DEADLINE, server_out.shutdown()).await, Ok(Ok(()))) {
                    break Ok(());
                }
            }
            make_room(&mut self.from_client.bytes);
            make_room(&mut self.from_server.bytes);
            let may_read_client = client_open && self.from_client.bytes.len() < BUFFER_MAX;
            let may_read_server = server_open && self.to_client.len() < BUFFER_MAX;
            tokio::select! {
                // In this order: a change of the world is heard however much flows, and what is there to be read is
                // taken before anything is written, so that it goes on in larger pieces.
                biased;
                () = &mut stopped => break Err(shutting_down(self.running.is_some())),
                () = &mut moved => break Err(leader_moved(follows.as_ref(), self.running.is_some())),
                outcome = finished(&mut self.running), if self.outcome.is_none() => self.outcome = Some(outcome),
                Some(question) = self.questions_heard.recv(), if self.question.is_none() => self.question = Some(question),
                () = self.remarks.heard(), if self.to_client.len() < BUFFER_MAX => {}
                read = client_in.read_buf(&mut self.from_client.bytes), if may_read_client => {
                    client_open = matches!(read, Ok(read) if read > 0);
                    if !client_open && self.running.is_some() {
                        // Nobody waits for it any more, and what it waits for may take hours; a job goes on.
                        break Ok(());
                    }
                }
                read = server_in.read_buf(&mut self.from_server.bytes), if may_read_server => {
                    server_open = matches!(read, Ok(read) if read > 0);
                }
                pushed = push(&mut server_out, &mut self.to_server), if !self.to_server.is_empty() || !server_flushed => {
                    server_flushed = matches!(pushed, Ok(true) | Err(_));
                    if pushed.is_err() {
                        // It does not read any more; what it has still to say comes from the other half.
                        self.to_server.clear();
                    }
                }
                pushed = push(&mut client_out, &mut self.to_client), if !self.to_client.is_empty() || !client_flushed => {
                    match pushed {
                        Ok(flushed) => client_flushed = flushed,
                        Err(_) => break Ok(()),
                    }
                }
            }
        };
        self.joined.ready(&self.gateway.backups.jobs, true);
        if let Err(error) = end
            && self.from_server.is_between_frames()
        {
            // Not in the middle of a frame of the server: the client could not tell our words from its bytes.
            Writer(&mut self.to_client).fatal(&self.speech.words(error));
        }
        let last_words = async {
            client_out.write_all_buf(&mut self.to_client).await?;
            client_out.shutdown().await
        };
        // Who does not listen does not hear.
        let _ = timeout(LAST_WORDS_DEADLINE, last_words).await;
    }

    /// Takes all that has come in as far as possible.
    fn digest(&mut self) -> Result<(), PgError> {
        self.digest_server()?;
        if self.asking.is_none()
            && let Some(question) = self.question.take()
        {
            self.put(question);
        }
        if self.from_server.is_between_frames() {
            let remarks = self.remarks.take().into_iter().collect();
            self.speech.notices(remarks).iter().for_each(|remark| Writer(&mut self.to_client).notice(remark));
            if let Some(outcome) = self.outcome.take() {
                self.finish(outcome);
            }
        }
        self.digest_client()
    }

    /// Nothing runs any more.
    pub(crate) fn end_running(&mut self) -> Option<Running> {
        self.cancelable.end();
        self.remarks.clear();
        (self.outcome, self.question) = (None, None);
        while self.questions_heard.try_recv().is_ok() {}
        self.running.take()
    }

    /// Whether everything that the client has sent has gone to the server or been answered.
    fn is_done_with_client(&self) -> bool {
        let is_idle = self.asking.is_none() && self.running.is_none() && self.script.is_none();
        self.to_server.is_empty() && is_idle && !self.held
    }

    fn server_lost(&self) -> PgError {
        let name = match &self.cancelable.route {
            crate::route::Route::Own => self.gateway.cluster.me().name(),
            crate::route::Route::Through { name, .. } => name.clone(),
        };
        // Whether its node is being stopped or has died, nobody can say from here.
        let hint = "Connect again; whether the last transaction was committed is not known.";
        PgError::new(SqlState::CONNECTION_FAILURE, format!("the connection to the server beside {name} was lost"))
            .hint(with_way_on(hint, self.running.is_some()))
    }
}

fn make_room(buffer: &mut BytesMut) {
    if buffer.capacity() - buffer.len() < READ_MIN {
        buffer.reserve(READ_SIZE);
    }
}

/// Writes some of `bytes`, or flushes when there are none left; true once nothing waits on the way out (TLS keeps a
/// buffer of its own).
async fn push(out: &mut (impl AsyncWrite + Unpin), bytes: &mut BytesMut) -> std::io::Result<bool> {
    if bytes.is_empty() {
        out.flush().await?;
        return Ok(true);
    }
    out.write_buf(bytes).await?;
    Ok(false)
}

async fn finished(running: &mut Option<Running>) -> Outcome {
    match running {
        Some(running) => running.future.as_mut().await,
        None => std::future::pending().await,
    }
}

/// Returns when another node leads the shard.
pub(crate) async fn moved(views: &mut watch::Receiver<Arc<View>>, follows: Option<&Follows>) {
    let Some(follows) = follows else { return std::future::pending().await };
    while views.changed().await.is_ok() {
        let view = Arc::clone(&views.borrow_and_update());
        if view.leader(&follows.shard).is_some_and(|leader| leader.instance != follows.instance) {
            return;
        }
    }
    std::future::pending().await
}

/// A hint to a client that loses its session, and how to go on where a statement of ours is at work: a job that it waits
/// for does not depend on the session.
fn with_way_on(hint: &str, waits_for_ours: bool) -> String {
    let way_on = " A job goes on: find it with SHOW JOBS and wait with SHOW JOB WHEN COMPLETE.";
    format!("{hint}{}", if waits_for_ours { way_on } else { "" })
}

fn leader_moved(follows: Option<&Follows>, waits_for_ours: bool) -> PgError {
    let shard = follows.map_or("", |follows| follows.shard.as_str());
    let message = format!("terminating connection because shard \"{shard}\" has another leaseholder");
    PgError::new(SqlState::ADMIN_SHUTDOWN, message).hint(with_way_on("Connect again to reach it.", waits_for_ours))
}

fn shutting_down(waits_for_ours: bool) -> PgError {
    let hint = if waits_for_ours {
        "The node is being stopped, and a job goes on elsewhere: connect to another node, find it with SHOW JOBS and wait \
         with SHOW JOB WHEN COMPLETE."
    } else {
        "The node is being stopped; connect to another one."
    };
    // PostgreSQL's own words for the same.
    PgError::new(SqlState::ADMIN_SHUTDOWN, "terminating connection due to administrator command").hint(hint)
}
