//! What nodes ask each other over a peer session.

use std::fmt;
use std::str::FromStr;

/// A question between nodes, printed and read as a short text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `BACKHAUL WHO ARE YOU [SINCE revision]`: the node's description of itself, as JSON.
    ///
    /// With a revision the answer may wait until the node has something newer to say, for a bounded time: asked again
    /// and again, this carries news at once and proves life without a second kind of message.
    WhoAreYou {
        /// The revision of the last answer that the asking node has seen.
        since: Option<u64>,
    },
    /// `BACKHAUL NODES`: the rows of `SHOW NODES`, for tools that hold the cluster secret and no PostgreSQL login.
    Nodes,
    /// `BACKHAUL CALL service request`: a request to one of the node's services, as JSON.
    Call {
        /// Which service.
        service: String,
        /// The request, as JSON on one line.
        request: String,
    },
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WhoAreYou { since: None } => f.write_str("BACKHAUL WHO ARE YOU"),
            Self::WhoAreYou { since: Some(revision) } => write!(f, "BACKHAUL WHO ARE YOU SINCE {revision}"),
            Self::Nodes => f.write_str("BACKHAUL NODES"),
            Self::Call { service, request } => write!(f, "BACKHAUL CALL {service} {request}"),
        }
    }
}

/// A text that is no verb; a node of another version may have sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownVerb;

impl FromStr for Verb {
    type Err = UnknownVerb;

    fn from_str(text: &str) -> Result<Self, UnknownVerb> {
        if let Some(call) = text.strip_prefix("BACKHAUL CALL ") {
            let (service, request) = call.split_once(' ').ok_or(UnknownVerb)?;
            return Ok(Self::Call { service: service.to_owned(), request: request.to_owned() });
        }
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["BACKHAUL", "WHO", "ARE", "YOU"] => Ok(Self::WhoAreYou { since: None }),
            ["BACKHAUL", "WHO", "ARE", "YOU", "SINCE", revision] => {
                Ok(Self::WhoAreYou { since: Some(revision.parse().map_err(|_| UnknownVerb)?) })
            }
            ["BACKHAUL", "NODES"] => Ok(Self::Nodes),
            _ => Err(UnknownVerb),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_verb_reads_back_as_itself() {
        let call = Verb::Call { service: "files".to_owned(), request: r#"{"a":" b  c"}"#.to_owned() };
        for verb in [Verb::WhoAreYou { since: None }, Verb::WhoAreYou { since: Some(7) }, Verb::Nodes, call] {
            assert_eq!(verb.to_string().parse(), Ok(verb));
        }
        for text in ["", "BACKHAUL", "BACKHAUL WHO ARE YOU SINCE yesterday", "SELECT 1"] {
            assert_eq!(text.parse::<Verb>(), Err(UnknownVerb), "{text}");
        }
    }
}
