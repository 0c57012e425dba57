//! Where a store is, as users write it, and how that may be shown.
//!
//! The schemes, their parameters and the texts of their refusals are CockroachDB's. What is not understood is refused,
//! never ignored: a parameter that a store does not know might have been the one that encrypts. A URI holds secrets, so
//! whatever prints it (`Display`, `Debug`, an error) prints it redacted; only [`Uri::exposed`] gives the full text, for
//! sealing. A URI that cannot be parsed is not quoted at all beyond its scheme.

use std::borrow::Cow;
use std::fmt;

use cluster::NodeId;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use pgerror::{PgError, SqlState};
use url::form_urlencoded;

use crate::s3::Bucket;

/// What is not itself in a host or a path that we print.
const ESCAPED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'<').add(b'>').add(b'?').add(b'`');

/// A collection's or a connection's place.
#[derive(Clone, PartialEq, Eq)]
pub struct Uri(pub(crate) Place);

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Files of one node, or (without a number) of whichever node uses the URI.
    Nodelocal { node: Option<NodeId>, path: String },
    /// An S3 bucket.
    S3(Bucket),
    /// What an external connection of this name stands for.
    External { name: String, path: String },
}

impl Uri {
    /// Reads a URI.
    ///
    /// # Errors
    ///
    /// The scheme, the host, the path or a parameter is not what a store needs; the text never has a secret in it.
    pub fn parse(text: &str) -> Result<Self, PgError> {
        let (scheme, rest) = split_scheme(text);
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, path) = match place.find('/') {
            Some(slash) => place.split_at(slash),
            None => (place, ""),
        };
        let (host, decoded) = (decode(host)?, decode(path)?);
        let parameters = form_urlencoded::parse(query.as_bytes());
        match scheme {
            "nodelocal" => {
                none_of(scheme, parameters)?;
                let shown = format!("nodelocal://{host}{decoded}");
                let node = node_of(&host, &shown)?;
                if decoded.is_empty() {
                    return Err(invalid("local storage requested but path not provided"));
                }
                Ok(Self(Place::Nodelocal { node, path: inside(&decoded)? }))
            }
            "external" => {
                none_of(scheme, parameters)?;
                if host.is_empty() {
                    let message = "host component of external URI must refer to an existing External Connection object";
                    return Err(invalid(message));
                }
                Ok(Self(Place::External { name: host.into_owned(), path: inside(&decoded)? }))
            }
            "s3" => Bucket::parse(&host, &decoded, parameters).map(|bucket| Self(Place::S3(bucket))),
            other => Err(invalid(format!(
                "unsupported storage scheme: \"{other}\" - refer to docs to find supported storage schemes"
            ))),
        }
    }

    /// The place below this one. Segments that would leave it again are refused when the result is opened.
    #[must_use]
    pub fn join(&self, sub: &str) -> Self {
        let mut joined = self.clone();
        let path = match &mut joined.0 {
            Place::Nodelocal { path, .. } | Place::External { path, .. } => path,
            Place::S3(bucket) => &mut bucket.path,
        };
        for segment in sub.split('/').filter(|segment| !segment.is_empty()) {
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(segment);
        }
        joined
    }

    /// The name of the external connection that this refers to, if it does.
    pub fn connection(&self) -> Option<&str> {
        self.external().map(|(name, _)| name)
    }

    pub(crate) fn external(&self) -> Option<(&str, &str)> {
        match &self.0 {
            Place::External { name, path } => Some((name, path)),
            _ => None,
        }
    }

    /// Whether using it takes rights that the node has and the user may not have: its files, or the credentials of its
    /// environment.
    pub fn uses_rights_of_the_node(&self) -> bool {
        match &self.0 {
            Place::Nodelocal { .. } => true,
            Place::S3(bucket) => bucket.is_implicit(),
            Place::External { .. } => false,
        }
    }

    /// What stands before `://`.
    pub fn scheme(&self) -> &'static str {
        match &self.0 {
            Place::Nodelocal { .. } => "nodelocal",
            Place::S3(_) => "s3",
            Place::External { .. } => "external",
        }
    }

    /// The node that it names, if it does.
    pub fn node(&self) -> Option<NodeId> {
        match &self.0 {
            Place::Nodelocal { node, .. } => *node,
            _ => None,
        }
    }

    /// What `nodelocal://self` is on `node`; nothing for any other URI.
    pub fn on(&self, node: NodeId) -> Option<Self> {
        match &self.0 {
            Place::Nodelocal { node: None, path } => {
                Some(Self(Place::Nodelocal { node: Some(node), path: path.clone() }))
            }
            _ => None,
        }
    }

    /// The whole text with its secrets, for sealing and for nothing else.
    pub fn exposed(&self) -> String {
        self.text(false)
    }

    /// Whether it is no node's own directory, so that every node that reaches it finds the same there.
    pub fn is_shared(&self) -> bool {
        !matches!(self.0, Place::Nodelocal { .. })
    }

    /// The text as it may be shown to everybody.
    pub fn redacted(&self) -> String {
        self.text(true)
    }

    fn text(&self, redacted: bool) -> String {
        let (scheme, host, path) = match &self.0 {
            Place::Nodelocal { node: None, path } => ("nodelocal", "self".to_owned(), path),
            Place::Nodelocal { node: Some(id), path } => ("nodelocal", id.to_string(), path),
            Place::S3(bucket) => ("s3", bucket.name.clone(), &bucket.path),
            Place::External { name, path } => ("external", name.clone(), path),
        };
        let host = utf8_percent_encode(&host, ESCAPED);
        let mut text = format!("{scheme}://{host}");
        if !path.is_empty() || scheme == "nodelocal" {
            text.push('/');
            text.extend(utf8_percent_encode(path, ESCAPED));
        }
        if let Place::S3(bucket) = &self.0 {
            text.push('?');
            text.push_str(&bucket.query(redacted));
        }
        text
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

impl fmt::Debug for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

/// The scheme, and what follows it. Text before `://` that cannot be a scheme is not one, and is not repeated.
fn split_scheme(text: &str) -> (&str, &str) {
    match text.split_once("://") {
        Some((scheme, rest))
            if scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c)) =>
        {
            (scheme, rest)
        }
        _ => ("", text),
    }
}

fn decode(text: &str) -> Result<Cow<'_, str>, PgError> {
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| invalid("the URI is not UTF-8"))?;
    if decoded.contains('\0') {
        return Err(invalid("the URI must not have a zero byte"));
    }
    Ok(decoded)
}

fn none_of(scheme: &str, parameters: form_urlencoded::Parse<'_>) -> Result<(), PgError> {
    unknown(scheme, parameters.map(|(name, _)| name.into_owned()).collect())
}

/// Refuses parameters that a scheme does not have.
pub(crate) fn unknown(scheme: &str, names: Vec<String>) -> Result<(), PgError> {
    if names.is_empty() {
        return Ok(());
    }
    Err(invalid(format!("unknown {scheme} query parameters: {}", names.join(", "))))
}

fn node_of(host: &str, shown: &str) -> Result<Option<NodeId>, PgError> {
    let rule = "host component of nodelocal URI must be a node ID";
    match host {
        "" => Err(invalid(format!(
            "{rule} (use 'self' to specify each node should access its own local filesystem): {shown}"
        ))),
        "self" => Ok(None),
        id => match id.parse() {
            Ok(id) if id > 0 => Ok(Some(NodeId(id))),
            _ => Err(invalid(format!("{rule}: {shown}"))),
        },
    }
}

/// A path below a root: without empty segments, and never leaving it.
///
/// # Errors
///
/// 42501 in CockroachDB's words, when a segment leads out.
pub(crate) fn inside(path: &str) -> Result<String, PgError> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !matches!(*segment, "" | ".")).collect();
    if segments.contains(&"..") || path.contains('\0') {
        let message = format!("local file access to paths outside of external-io-dir is not allowed: {path}");
        return Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message));
    }
    Ok(segments.join("/"))
}

pub(crate) fn invalid(message: impl Into<String>) -> PgError {
    PgError::new(SqlState::INVALID_PARAMETER_VALUE, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_read_and_written_back() {
        for (text, exposed, redacted) in [
            ("nodelocal://self/a/b", "nodelocal://self/a/b", "nodelocal://self/a/b"),
            ("nodelocal://3//a/./b%20c/", "nodelocal://3/a/b%20c", "nodelocal://3/a/b%20c"),
            ("nodelocal://1/", "nodelocal://1/", "nodelocal://1/"),
            ("external://west", "external://west", "external://west"),
            ("external://west/sub/dir", "external://west/sub/dir", "external://west/sub/dir"),
            (
                "s3://b/p?AWS_SECRET_ACCESS_KEY=a%2Fb+c&AWS_ACCESS_KEY_ID=AK&AWS_SESSION_TOKEN=t%3D",
                "s3://b/p?AWS_ACCESS_KEY_ID=AK&AWS_SECRET_ACCESS_KEY=a%2Fb%2Bc&AWS_SESSION_TOKEN=t%3D",
                "s3://b/p?AWS_ACCESS_KEY_ID=AK&AWS_SECRET_ACCESS_KEY=redacted&AWS_SESSION_TOKEN=redacted",
            ),
            ("s3://b?AUTH=implicit", "s3://b?AUTH=implicit", "s3://b?AUTH=implicit"),
        ] {
            let uri = Uri::parse(text).unwrap();
            assert_eq!(uri.exposed(), exposed);
            assert_eq!(uri.to_string(), redacted);
            assert_eq!(format!("{uri:?}"), redacted);
            assert_eq!(Uri::parse(&uri.exposed()).unwrap().exposed(), exposed);
        }
    }

    #[test]
    fn what_a_store_cannot_be_is_refused_without_quoting_secrets() {
        let outside = "local file access to paths outside of external-io-dir is not allowed: ";
        for (text, code, message) in [
            (
                "nodelocal:///a",
                "22023",
                "host component of nodelocal URI must be a node ID (use 'self' to specify each node should access its \
                 own local filesystem): nodelocal:///a"
                    .to_owned(),
            ),
            (
                "nodelocal://me/a",
                "22023",
                "host component of nodelocal URI must be a node ID: nodelocal://me/a".to_owned(),
            ),
            (
                "nodelocal://0/a",
                "22023",
                "host component of nodelocal URI must be a node ID: nodelocal://0/a".to_owned(),
            ),
            ("nodelocal://self", "22023", "local storage requested but path not provided".to_owned()),
            ("nodelocal://self/a?B=c&D=e", "22023", "unknown nodelocal query parameters: B, D".to_owned()),
            ("nodelocal://self/a/../../b", "42501", format!("{outside}/a/../../b")),
            ("nodelocal://self/%2e%2e/b", "42501", format!("{outside}/../b")),
            ("external://n/../b", "42501", format!("{outside}/../b")),
            ("external:///b", "22023", {
                "host component of external URI must refer to an existing External Connection object".to_owned()
            }),
            ("gopher://hunter2/b", "22023", {
                "unsupported storage scheme: \"gopher\" - refer to docs to find supported storage schemes".to_owned()
            }),
            ("hunter2://b@", "22023", {
                "unsupported storage scheme: \"hunter2\" - refer to docs to find supported storage schemes".to_owned()
            }),
            ("/just/hunter2://x", "22023", {
                "unsupported storage scheme: \"\" - refer to docs to find supported storage schemes".to_owned()
            }),
        ] {
            let error = Uri::parse(text).unwrap_err();
            assert_eq!((error.code.as_str(), error.message), (code, message), "{text}");
        }
    }

    #[test]
    fn joining_adds_segments_once() {
        for (uri, sub, joined) in [
            ("nodelocal://self/", "/a//b/", "nodelocal://self/a/b"),
            ("external://c/x", "y", "external://c/x/y"),
            ("s3://b?AUTH=implicit", "y", "s3://b/y?AUTH=implicit"),
            ("s3://b/x?AUTH=implicit", "", "s3://b/x?AUTH=implicit"),
        ] {
            assert_eq!(Uri::parse(uri).unwrap().join(sub).exposed(), joined);
        }
    }
}
