//! What goes wrong with a store, in words that a client may be told.
//!
//! The libraries below speak in their own terms, with headers and whole requests in them. Here that becomes one of a
//! few sentences that name the store by its redacted URI, and a mark on those that may pass: a caller that has time
//! asks [`is_transient`] and tries again, another one gives up at once.

use std::fmt;
use std::io;
use std::sync::Arc;

use opendal::ErrorKind;
use pgerror::{PgError, SqlState};

/// A detail that a store gave is cut there; what it says beyond is not shown.
const DETAIL_MAX: usize = 300;

/// Codes of S3 that mean "not now". A status of 5xx means the same.
const PASSING_CODES: [&str; 9] = [
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
];

/// Which store an error is about.
#[derive(Clone)]
pub(crate) struct Place {
    /// The redacted URI.
    pub(crate) at: Arc<str>,
    /// The node that tries to reach it, in words; of a node's own files the URI says whose they are.
    pub(crate) from: Option<Arc<str>>,
    /// The bucket, when it has one.
    pub(crate) bucket: Option<Arc<str>>,
    /// Texts that are cut out of whatever the store says.
    pub(crate) secrets: Arc<[String]>,
}

/// The mark of an error that may pass; it stands in the chain as a context.
#[derive(Debug)]
struct Transient;

impl fmt::Display for Transient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("use a store that may answer again soon")
    }
}

/// Whether the same request may succeed a little later: the store or the node that holds it was not reached, was too
/// busy, or broke off. Wrong credentials, missing buckets and full disks do not pass by themselves.
pub fn is_transient(error: &anyhow::Error) -> bool {
    const UNREACHED: [SqlState; 3] =
        [SqlState::CONNECTION_FAILURE, SqlState::CANNOT_CONNECT_NOW, SqlState::ADMIN_SHUTDOWN];
    error.downcast_ref::<Transient>().is_some() || PgError::of(error).is_some_and(|said| UNREACHED.contains(&said.code))
}

/// Marks an error as one that may pass.
pub(crate) fn transient(error: PgError) -> anyhow::Error {
    anyhow::Error::from(error).context(Transient)
}

impl Place {
    /// A place without secrets.
    pub(crate) fn plain(at: impl Into<Arc<str>>) -> Self {
        Self { at: at.into(), from: None, bucket: None, secrets: Arc::from([]) }
    }

    /// It did not answer.
    pub(crate) fn unreachable(&self, detail: &str) -> anyhow::Error {
        let from = self.from.as_deref().map(|node| format!(" from {node}")).unwrap_or_default();
        let message = format!("the store at {} cannot be reached{from}", self.at);
        transient(PgError::new(SqlState::IO_ERROR, message).detail(self.clean(detail)))
    }

    /// It did not answer in time.
    pub(crate) fn late(&self) -> anyhow::Error {
        self.unreachable(&format!("It did not answer within {} seconds.", crate::REQUEST_DEADLINE.as_secs()))
    }

    /// A file that is written once exists.
    pub(crate) fn exists(&self, path: &str) -> PgError {
        let message = format!("file \"{path}\" already exists in the store at {}", self.at);
        PgError::new(SqlState::DUPLICATE_FILE, message)
    }

    /// A file that is read is longer than a reader takes.
    pub(crate) fn too_long(&self, path: &str, max: usize) -> PgError {
        let message = format!("file \"{path}\" in the store at {} is too long", self.at);
        let detail = format!("At most {max} bytes are taken at once.");
        PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message).detail(detail)
    }

    fn full(&self) -> PgError {
        PgError::new(SqlState::DISK_FULL, format!("the store at {} is full", self.at))
    }

    fn refused(&self, detail: &str) -> PgError {
        let message = format!("the store at {} refused access", self.at);
        PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).detail(self.clean(detail))
    }

    fn failed(&self, detail: &str) -> PgError {
        PgError::new(SqlState::IO_ERROR, format!("the store at {} failed", self.at)).detail(self.clean(detail))
    }

    /// Of a file system.
    pub(crate) fn of_io(&self, error: &io::Error) -> anyhow::Error {
        let said = match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => self.refused(&sentence(error)),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => self.full(),
            io::ErrorKind::NotFound => {
                PgError::new(SqlState::UNDEFINED_FILE, format!("the directory of the store at {} is gone", self.at))
            }
            io::ErrorKind::Interrupted | io::ErrorKind::TimedOut | io::ErrorKind::StaleNetworkFileHandle => {
                return transient(self.failed(&sentence(error)));
            }
            _ => self.failed(&sentence(error)),
        };
        said.into()
    }

    /// Of another node on the way to its files: its own words stand, a broken connection becomes ours.
    pub(crate) fn of_peer(&self, error: anyhow::Error) -> anyhow::Error {
        match PgError::of(&error) {
            Some(said) if said.code == SqlState::CONNECTION_FAILURE => {
                let said = said.clone();
                self.unreachable(&format!("{}: {}", said.message, said.detail.unwrap_or_default()))
            }
            Some(_) => error,
            None => {
                tracing::info!("a node's files could not be used: {error:#}");
                self.unreachable("The connection to the node that holds the files was lost.")
            }
        }
    }

    /// Of an object store.
    pub(crate) fn of_store(&self, error: &opendal::Error) -> anyhow::Error {
        let code = code(error.message());
        let detail = match code {
            Some(code) => {
                format!("The store answered {code}: {}", part(error.message(), "message").unwrap_or_default())
            }
            None => format!("{}: {}", error.kind(), error.message()),
        };
        match (error.kind(), code) {
            (_, Some("NoSuchBucket")) => {
                let bucket = self.bucket.as_deref().unwrap_or_default();
                let said = PgError::new(SqlState::UNDEFINED_FILE, format!("bucket \"{bucket}\" does not exist"));
                said.detail(format!("The store is {}.", self.at)).into()
            }
            (_, Some("XMinioStorageFull" | "InsufficientStorage")) => self.full().into(),
            (_, Some("PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException")) => {
                self.failed(&detail).hint("Set AWS_REGION to the bucket's region.").into()
            }
            (ErrorKind::PermissionDenied, Some(_)) => self.refused(&detail).into(),
            // Without an S3 code in it, an answer of 403 is from something in between, or to a HEAD.
            (ErrorKind::PermissionDenied, None) => self.refused("The store or a proxy before it answered 403.").into(),
            _ if !was_answered(error) => self.unreachable(&format!("The last try ended in: {}.", root_cause(error))),
            _ if may_pass(error, code) => transient(self.failed(&detail)),
            _ => self.failed(&detail).into(),
        }
    }

    /// One line of bounded length without queries and without our secrets.
    fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in self.secrets.iter().filter(|secret| !secret.is_empty()) {
            text = text.replace(secret.as_str(), "redacted");
        }
        let words = text.split_whitespace().map(|word| match word.find('?') {
            Some(query) if word.contains("://") => &word[..query],
            _ => word,
        });
        let mut line = words.collect::<Vec<_>>().join(" ");
        if let Some((cut, _)) = line.char_indices().nth(DETAIL_MAX) {
            line.truncate(cut);
            line.push_str("...");
        }
        if !line.ends_with(['.', '!']) {
            line.push('.');
        }
        line
    }
}

fn sentence(error: &io::Error) -> String {
    format!("The file system said: {error}.")
}

/// Whether an answer of the store came back at all. The library says otherwise in these words only.
fn was_answered(error: &opendal::Error) -> bool {
    const UNANSWERED: [&str; 4] = [
        "send http request",
        "read data from http response",
        "operation timeout reached",
        "io operation timeout reached",
    ];
    !UNANSWERED.contains(&error.message())
}

/// After its retries the library calls every error persistent, so that it has to be judged by what was answered.
fn may_pass(error: &opendal::Error, code: Option<&str>) -> bool {
    let by_code = code.is_some_and(|code| PASSING_CODES.contains(&code));
    // The status stands in the error's context, which can only be printed.
    let by_status = || format!("{error:?}").contains("status: 5");
    by_code || matches!(error.kind(), ErrorKind::RateLimited | ErrorKind::Conflict) || by_status()
}

fn root_cause(error: &opendal::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    match cause.downcast_ref::<opendal::Error>() {
        Some(itself) => itself.message().to_owned(),
        None => cause.to_string(),
    }
}

/// The code in an S3 error, which the library prints as `S3Error { code: "X", message: "Y", .. }`.
fn code(message: &str) -> Option<&str> {
    part(message.strip_prefix("S3Error")?, "code").filter(|code| !code.is_empty())
}

fn part<'m>(message: &'m str, name: &str) -> Option<&'m str> {
    let (_, rest) = message.split_once(&format!("{name}: \""))?;
    rest.split_once('"').map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            at: "s3://b/p".into(),
            from: Some("node 1".into()),
            bucket: Some("b".into()),
            secrets: vec!["hunter2".to_owned()].into(),
        }
    }

    fn s3(kind: ErrorKind, code: &str) -> opendal::Error {
        let message = format!("S3Error {{ code: \"{code}\", message: \"no hunter2 here\", resource: \"\" }}");
        opendal::Error::new(kind, message)
    }

    #[test]
    fn a_stores_errors_are_few_and_say_whether_they_may_pass() {
        for (error, code, message, passes) in [
            (s3(ErrorKind::ConfigInvalid, "NoSuchBucket"), "58P01", "bucket \"b\" does not exist", false),
            (
                s3(ErrorKind::PermissionDenied, "SignatureDoesNotMatch"),
                "42501",
                "the store at s3://b/p refused access",
                false,
            ),
            (s3(ErrorKind::Unexpected, "SlowDown"), "58030", "the store at s3://b/p failed", true),
            (s3(ErrorKind::Unexpected, "MalformedXML"), "58030", "the store at s3://b/p failed", false),
            (s3(ErrorKind::Unexpected, "XMinioStorageFull"), "53100", "the store at s3://b/p is full", false),
            (
                opendal::Error::new(ErrorKind::Unexpected, "send http request")
                    .set_source(io::Error::from(io::ErrorKind::ConnectionRefused)),
                "58030",
                "the store at s3://b/p cannot be reached from node 1",
                true,
            ),
            (
                opendal::Error::new(ErrorKind::Unexpected, "<html>").with_context("response", "Parts { status: 503 }"),
                "58030",
                "the store at s3://b/p failed",
                true,
            ),
        ] {
            let error = place().of_store(&error).context("write the manifest");
            let said = PgError::of(&error).unwrap();
            assert_eq!((said.code.as_str(), said.message.as_str()), (code, message));
            assert_eq!(is_transient(&error), passes, "{error:?}");
            assert!(!format!("{error:?}{said:?}").contains("hunter2"));
        }
    }

    #[test]
    fn a_file_systems_errors_are_told_apart() {
        for (kind, code) in [
            (io::ErrorKind::StorageFull, "53100"),
            (io::ErrorKind::PermissionDenied, "42501"),
            (io::ErrorKind::NotFound, "58P01"),
            (io::ErrorKind::IsADirectory, "58030"),
        ] {
            let error = Place::plain("nodelocal://self/a").of_io(&kind.into());
            assert_eq!(PgError::of(&error).unwrap().code.as_str(), code);
        }
    }

    #[test]
    fn details_are_short_and_have_no_queries() {
        let said = place().clean(&format!("GET http://h/p?X-Amz-Signature=1 failed\n{}", "x".repeat(400)));
        assert!(said.starts_with("GET http://h/p failed xxx") && said.ends_with("x..."), "{said}");
        assert!(said.len() < DETAIL_MAX + 5);
    }
}
